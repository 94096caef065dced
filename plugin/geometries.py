"""Which model `lorafuse bench` trains: a published geometry by name, or a model's folder."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from transformers import PretrainedConfig

from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.geometry_table import GEOMETRIES, NAMED_FAMILIES
from lorafuse.plugin.sketch import load_config


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

    `named-families` stands for the geometries that have a family, and a name behind a `-` is left
    out. A folder may have commas.

    Raises:
        FuseConfigError: Nothing is left, or what is left out was not there.
    """
    if Path(asked).is_dir():
        return [asked]
    found: list[str] = []
    words = [word.strip() for word in asked.split(",")]
    for name in (word for word in words if not word.startswith("-")):
        named = [one for one, geometry in GEOMETRIES.items() if geometry.family]
        found += named if name == NAMED_FAMILIES else [name]
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
        name: One of `GEOMETRIES`, or a folder with a `config.json`. Without weights beside it,
            they are random ones.
        layers: Keep only the first ones.

    Raises:
        FuseConfigError: There is no such model, or it has fewer layers.
    """
    if name in GEOMETRIES:
        model = Model(name, GEOMETRIES[name].config(), None)
    elif (folder := Path(name)).is_dir():
        held = any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())
        model = Model(name, load_config({"base_model": name}), folder if held else None)
    else:
        near = get_close_matches(name, GEOMETRIES, n=1, cutoff=0.5)
        meant = f"did you mean `{near[0]}`? " if near else ""
        raise FuseConfigError(
            f"--model {name} is neither a geometry nor a folder; {meant}the geometries are "
            f"{', '.join(GEOMETRIES)}; or give the folder of a model, which at least holds a "
            "config.json"
        )
    if layers is not None:
        keep_layers(model.config, layers)
    return model


def keep_layers(config: PretrainedConfig, layers: int) -> None:
    """Cuts the config to its first layers, with the lists that say something of each layer."""
    text = config.get_text_config()
    whole = text.num_hidden_layers
    if not 1 <= layers <= whole:
        raise FuseConfigError(f"--layers {layers}: the model has {whole}; give 1 to {whole}")
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
