"""A Lance checkpoint as it is published: three parts in one folder, the transformer's twice, for pictures and for videos."""

import dataclasses
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from bagel_opt.config import LLMConfig, SpecialTokens
from bagel_opt.errors import CheckpointError
from bagel_opt.files.collecting import Weights
from bagel_opt.files.finding import PICKLED, quantized_parts, transformer_files
from bagel_opt.files.weights import Location, read_header
from bagel_opt.files.written_config import write_json
from bagel_opt.json_files import read_json
from bagel_opt.lance.config import GENERATION, LanceConfig, QwenViTConfig, WanConfig

LLMS = {"Lance_3B": "image", "Lance_3B_Video": "video"}  # and what each was trained to draw
DRAWS = "draws"  # a field of our own: a folder that was written by itself has no sibling by which that would show
VIT, VIT_FILE = "Qwen2.5-VL-ViT", "vit.safetensors"
VAE_FILE, VAE_PICKLE = "Wan2.2_VAE.safetensors", "Wan2.2_VAE.pth"
SIZES, MODEL_TYPE = "llm_config.json", "qwen2_5_vl"
DROPPED = "latent_pos_embed.pos_embed"  # a table that is computed
Shapes = Mapping[str, tuple[int, ...]]


def find_transformer(place: Path) -> Path | None:
    """The folder of the transformer, of the whole download or of that folder itself; None for what is no Lance checkpoint."""
    for folder in (place, *(place / name for name in LLMS)):
        sizes = folder / SIZES
        if sizes.is_file() and (data := _fields(sizes)).get("model_type") == MODEL_TYPE and "vision_config" in data:
            return folder
    return None


def collect(folder: Path) -> Weights:
    """The tensors of a transformer's folder, and of the ViT and the VAE that lie beside it. Raises FileNotFoundError and
    CheckpointError, also where the VAE is there as a pickle alone."""
    found = Weights(kinds=quantized_parts(folder))
    plain = [path for name in ("model.safetensors", "ema.safetensors") if (path := folder / name).is_file()]
    for path in plain[:1] or transformer_files(folder)[0]:
        _add(found, path, "")
    if len(plain) > 1:
        found.notes.append(f"taking {plain[0].name} of {folder}; there is {plain[1].name} too")
    vit, vae = folder.parent / VIT / VIT_FILE, folder.parent / VAE_FILE
    if not any(name.startswith("vit_model.") for name in found.tensors):
        _add(found, vit, "vit_model.")
    if not vae.is_file() and (pickle := folder.parent / VAE_PICKLE).is_file():
        raise CheckpointError(
            f"{pickle} is {PICKLED}; `bagel-opt convert {folder.parent}` reads its numbers alone and writes {VAE_FILE} beside it"
        )
    if not vae.is_file():
        raise FileNotFoundError(
            f"{vae} is missing; it is published as a pickle, of which `bagel-opt convert` with the checkpoint makes it"
        )
    _add(found, vae, "vae.")
    if others := [name for name in LLMS if name != folder.name and (folder.parent / name / SIZES).is_file()]:
        found.notes.append(
            f"taking {folder}, which draws {LLMS.get(folder.name)}s; {others[0]} beside it is another model"
        )
    return found


def _add(found: Weights, path: Path, prefix: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the whole checkpoint there")
    for name, at in read_header(path, CheckpointError)[0].items():
        if name != DROPPED:
            found.add(prefix + name, (path, name), _flat(name, at))


def _flat(name: str, at: Location) -> Location:
    """A convolution over patches, of the size of its stride, is a product."""
    if name.endswith("patch_embed.proj.weight") and len(at.shape) == 5:
        rows, *patch = at.shape
        return dataclasses.replace(at, shape=(rows, prod(patch)))
    return at


def read_config(folder: Path, shapes: Shapes, special: SpecialTokens, tokens: int) -> LanceConfig:
    """tokens: of the tokenizer, beyond which none is written. Raises FileNotFoundError and CheckpointError."""
    llm, vit = _fields(folder / SIZES), _fields(folder.parent / VIT / "config.json")
    try:
        return _config(folder, llm, vit, shapes, special, tokens)
    except KeyError as error:
        raise CheckpointError(f"{folder}: {SIZES} or {VIT}/config.json lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error!s:.600}") from None


def _config(folder: Path, llm: dict, vit: dict, shapes: Shapes, special: SpecialTokens, tokens: int) -> LanceConfig:
    for name, act, known in ((SIZES, llm, "silu"), (VIT, vit, "silu")):
        if act.get("hidden_act", known) != known:
            raise ValueError(f"{name} has hidden_act {act['hidden_act']!r:.60}; Lance uses {known!r}")
    for field, token in (("vision_start_token_id", "start_of_image"), ("vision_end_token_id", "end_of_image")):
        if llm.get(field, getattr(special, token)) != getattr(special, token):
            raise ValueError(f"{field} is {llm[field]!r:.60}, and the tokenizer's is {getattr(special, token)}")
    vision = llm["vision_config"] | vit
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    there = {name for name in LLMS if (folder.parent / name / SIZES).is_file()}
    return LanceConfig(
        llm=LLMConfig(
            *(llm[name] for name in sizes),
            llm["vocab_size"],
            rope_theta=llm.get("rope_theta", 1e6),
            rms_norm_eps=llm.get("rms_norm_eps", 1e-6),
        ),
        vit=QwenViTConfig(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_hidden_layers=vision["depth"],
            num_attention_heads=vision["num_heads"],
            patch_size=vision["patch_size"],
            window_size=vision["window_size"],
            tokens_per_second=llm["vision_config"]["tokens_per_second"],
            fullatt_block_indexes=tuple(vision["fullatt_block_indexes"]),
            num_channels=vision.get("in_chans", 3),
            spatial_merge_size=llm["vision_config"].get("spatial_merge_size", 2),
            temporal_patch_size=vision.get("temporal_patch_size", 2),
        ),
        vae=_vae(shapes),
        special=special,
        mrope_section=tuple(llm["rope_scaling"]["mrope_section"]),
        token_limit=tokens,
        draws=_draws(
            llm.get(DRAWS, [LLMS[folder.name]] if there == set(LLMS) and folder.name in LLMS else [*LLMS.values()])
        ),
        generation=GENERATION,
    )


def _draws(said: object) -> tuple[str, ...]:
    if not isinstance(said, list) or not said or not all(one in LLMS.values() for one in said):
        raise ValueError(f"{DRAWS} is {said!r:.60}; it must hold {' or '.join(LLMS.values())}, or both")
    return tuple(said)


def write_config(place: Path, name: str, source: Path, config: LanceConfig, **more: Any) -> None:
    """The JSON files of a checkpoint with one transformer, in the folder `name` of `place`, from those beside and in the folder
    of another one. more: fields of its config.json."""
    (place / VIT).mkdir()
    write_json(place / VIT / "config.json", _fields(source.parent / VIT / "config.json"))
    (place / name).mkdir()
    write_json(place / name / SIZES, {**_fields(source / SIZES), DRAWS: [*config.draws]})
    write_json(place / name / "config.json", {"generation": dict(config.generation), **more})


def _vae(shapes: Shapes) -> WanConfig:
    """All of it follows from names and shapes."""

    def width(name: str) -> int:
        return shapes[f"vae.{name}.weight"][0]

    def levels(half: str, kind: str) -> tuple[tuple[int, ...], tuple[bool, ...], int]:
        pattern = re.compile(rf"vae\.{half}\.{kind}\.(\d+)\.{kind}\.(\d+)\.(residual\.2|time_conv|resample\.1)\.weight")
        found = [(*map(int, m.groups()[:2]), m[3]) for name in shapes if (m := pattern.fullmatch(name))]
        count = 1 + max((level for level, _, _ in found), default=-1)
        widths = [width(f"{half}.{kind}.{level}.{kind}.0.residual.2") for level in range(count)]
        time = [any(one[0] == level and one[2] == "time_conv" for one in found) for level in range(count - 1)]
        blocks = sum(level == 0 and what == "residual.2" for level, _, what in found)
        return (width(f"{half}.conv1"), *widths), tuple(time), blocks

    encoder, encoder_time, blocks = levels("encoder", "downsamples")
    decoder, decoder_time, _ = levels("decoder", "upsamples")
    return WanConfig(encoder, decoder, encoder_time, decoder_time, blocks, width("conv2"))


def _fields(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a Lance checkpoint has it")
    data = read_json(path, CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, not an object of fields")
    return data
