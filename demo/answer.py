"""Loads an adapter with plain PEFT, in a process that cannot import lorafuse, and answers a prompt.

python demo/answer.py MODEL ADAPTER PROMPT
"""

import sys

# None here makes every `import lorafuse` fail.
sys.modules["lorafuse"] = None  # type: ignore[assignment]


def main(model_folder: str, adapter: str, prompt: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, adapter).eval()
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    if not trained or not all(p.any() for p in trained):
        raise SystemExit("the adapter did not reach the model: some lora_B is still zero")
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"plain PEFT, without lorafuse, {len(trained)} adapted layers")
    print(f"  user:      {prompt}\n  assistant: {text.strip()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
