"""The README's table of the families that lorafuse names, from the rows of FAMILIES.md.

FAMILIES.md is what `lorafuse families --markdown` found. The README repeats the rows of `NAMED`,
between two marks, so that no one has to keep two tables in step; a test compares them.
"""

from lorafuse.plugin.errors import FuseConfigError

BEGIN = "<!-- named families: written by `lorafuse families --readme README.md`; do not edit -->"
END = "<!-- end of the named families -->"
# What the README calls a family -> transformers' model type.
NAMED: dict[str, str] = {
    "Llama 1 to 3.3": "llama",
    "Mistral 7B, Nemo, Large": "mistral",
    "Ministral 8B": "ministral",
    "Ministral 3": "ministral3",
    "Gemma 1": "gemma",
    "Gemma 2": "gemma2",
    "Gemma 3 (text)": "gemma3_text",
    "Qwen 1.5, 2, 2.5": "qwen2",
    "Qwen 3": "qwen3",
    "Phi-2": "phi",
    "Phi-3, 3.5, 4": "phi3",
    "Phi-3.5 MoE": "phimoe",
    "DeepSeek-V2": "deepseek_v2",
    "DeepSeek-V3": "deepseek_v3",
    "Mixtral": "mixtral",
    "Qwen2-MoE": "qwen2_moe",
    "Qwen3-MoE": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "Granite": "granite",
    "Cohere 1 (Command R)": "cohere",
    "Cohere 2 (Command R7B, A)": "cohere2",
    "OLMo 2": "olmo2",
    "OLMo 3": "olmo3",
    "SmolLM3": "smollm3",
    "GLM-4 (0414)": "glm4",
    "GLM-4 9B": "glm",
    "StableLM": "stablelm",
    "Falcon": "falcon",
}
_LAST = "what runs as stock, and why"


def rows(page: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    """(the names of the columns of counts, model type -> column -> cell) of FAMILIES.md.

    Raises:
        FuseConfigError: `page` holds no such table.
    """
    lines = page.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("| family | ")), None)
    if start is None:
        raise FuseConfigError("the page has no table of families (`lorafuse families --markdown`)")
    header = _cells(lines[start])
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("| "):
            break
        # a reason may hold escaped bars: it is the last cell
        row = dict(zip(header, line[2:].split(" | ", len(header) - 1), strict=False))
        found[row["family"]] = row
    columns = [name for name in header if name not in ("family", "class", "level", _LAST)]
    return columns, found


def block(page: str) -> str:
    """The README's table, from the text of FAMILIES.md.

    Raises:
        FuseConfigError: a named family has no row there, as on a page of `--only`.
    """
    columns, found = rows(page)
    missing = [model_type for model_type in NAMED.values() if model_type not in found]
    if missing:
        raise FuseConfigError(f"the page has no row for {', '.join(missing)}")
    lines = [f"| family | model type | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, model_type in NAMED.items():
        row = found[model_type]
        cells = [row.get(column, "").strip() or "–" for column in columns]
        lines.append(f"| {name} | {model_type} | {' | '.join(cells)} |")
    return "\n".join(lines)


def inserted(readme: str, page: str) -> str:
    """The README's text with the table of today between its marks.

    Raises:
        FuseConfigError: the marks are not there, or the page lacks a row.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FuseConfigError(f"the README has no two lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{block(page)}\n{END}{after}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
