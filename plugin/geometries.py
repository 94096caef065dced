"""Which model `lorafuse bench` trains: a published geometry by name, or a model's folder."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.geometry_table import GEOMETRIES, NAMED_FAMILIES
from lorafuse.plugin.image_geometry_table import IMAGE_GEOMETRIES, NAMED_IMAGE_FAMILIES
from lorafuse.plugin.sketch import load_config

BY_NAME = GEOMETRIES | IMAGE_GEOMETRIES
GROUPS = {
    NAMED_FAMILIES: [name for name, one in GEOMETRIES.items() if one.family],
    NAMED_IMAGE_FAMILIES: [*IMAGE_GEOMETRIES],
}
# Ends of the names of lists that say which layers, by their numbers, differ from the others.
_LAYER_LISTS = ("_layers", "_indices", "_indexes")


@dataclass(frozen=True)
class Model:
    """What is to be trained.

    Attributes:
        name: The geometry, or the folder.
        config: The model's config, cut to the layers that were asked for.
        weights: The folder that weights are loaded from; None: random ones.
    """

    name: str
    config: PretrainedConfig
    weights: Path | None


def model_names(asked: str) -> list[str]:
    """The models of `--model`: names with commas between, each once.

    A name of `GROUPS` stands for the geometries of that group, and a name behind a `-` is left out.
    A folder may have commas.

    Raises:
        FuseConfigError: Nothing is left, or what is left out was not there.
    """
    if Path(asked).is_dir():
        return [asked]
    found: list[str] = []
    words = [word.strip() for word in asked.split(",")]
    for name in (word for word in words if not word.startswith("-")):
        found += GROUPS.get(name, [name])
    for name in (word[1:] for word in words if word.startswith("-")):
        if name not in found:
            raise FuseConfigError(f"--model {asked}: there is no {name} to leave out")
        found = [one for one in found if one != name]
    if not found:
        raise FuseConfigError(f"--model {asked} names no model")
    return list(dict.fromkeys(found))


def find_model(name: str, layers: int | None = None) -> Model:
    """A geometry by its name, or the model in a folder.

    Args:
        name: One of `BY_NAME`, or a folder with a `config.json`. Without weights beside it,
            they are random ones.
        layers: Keep only the first ones, of a vision tower too.

    Raises:
        FuseConfigError: There is no such model, or it has fewer layers.
    """
    if name in BY_NAME:
        model = Model(name, BY_NAME[name].config(), None)
    elif (folder := Path(name)).is_dir():
        held = any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())
        model = Model(name, load_config({"base_model": name}), folder if held else None)
    else:
        near = get_close_matches(name, BY_NAME, n=1, cutoff=0.5)
        meant = f"did you mean `{near[0]}`? " if near else ""
        raise FuseConfigError(
            f"--model {name} is neither a geometry nor a folder; {meant}the geometries are "
            f"{', '.join(BY_NAME)}; or give the folder of a model, which at least holds a "
            "config.json"
        )
    if layers is not None:
        keep_layers(model.config, layers)
    return model


def keep_layers(config: PretrainedConfig, layers: int) -> None:
    """Cuts the config to its first layers, with the lists that say something of each layer.

    A vision tower is cut to as many, or keeps all where it has no more. Of a list that names layers
    by their numbers, the last layer stays where none would: what differs in them is tried too.
    """
    text = config.get_text_config()
    whole = text.num_hidden_layers
    if not 1 <= layers <= whole:
        raise FuseConfigError(f"--layers {layers}: the model has {whole}; give 1 to {whole}")
    _keep(text, "num_hidden_layers", layers)
    tower: Any = getattr(config, "vision_config", None)
    if isinstance(tower, PretrainedConfig):
        depth = "depth" if hasattr(tower, "depth") else "num_hidden_layers"
        _keep(tower, depth, min(layers, getattr(tower, depth)))
        if hasattr(tower, "num_global_layers"):  # Llama 3.2 Vision's second stack
            tower.num_global_layers = min(layers, tower.num_global_layers)
            # It hands on its output beside that of each layer named.
            outputs = 1 + len(tower.intermediate_layers_indices)
            tower.vision_output_dim = tower.hidden_size * outputs


def _keep(config: PretrainedConfig, depth: str, layers: int) -> None:
    whole = getattr(config, depth)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:layers])
        elif isinstance(value, list | tuple) and value and name.endswith(_LAYER_LISTS):
            if all(isinstance(one, int) for one in value):
                setattr(config, name, [one for one in value if one < layers] or [layers - 1])
    setattr(config, depth, layers)


def layers_of(config: PretrainedConfig) -> list[int]:
    """Of the text tower and, where there is one, of the vision tower."""
    tower: Any = getattr(config, "vision_config", None)
    found = [config.get_text_config().num_hidden_layers]
    if isinstance(tower, PretrainedConfig):
        found.append(getattr(tower, "depth", None) or tower.num_hidden_layers)
    return found
