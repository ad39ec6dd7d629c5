"""Lance's autoencoder as safetensors: it is published as a pickle, of which torch reads the numbers alone."""

import pickle
from pathlib import Path

import torch
from safetensors.torch import save_file

from bagel_opt.errors import CheckpointError, reason
from bagel_opt.files.finding import find_file
from bagel_opt.files.lance import VAE_FILE, VAE_PICKLE
from bagel_opt.files.replacing import replacing


def convert(source: str | Path, out: str | Path | None = None) -> Path:
    """Writes the autoencoder of a Lance checkpoint as safetensors and returns the file.

    source: the folder of the download, the pickle itself, or a repo id. out: a folder; by default the pickle's. torch reads the
    pickle without running anything in it. Raises FileNotFoundError, and CheckpointError for what holds other things than
    tensors by name.
    """
    path = find_file(source, VAE_PICKLE, f"the folder of a Lance checkpoint, or its {VAE_PICKLE}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's advice is to run what is in it
        raise CheckpointError(f"{path} is no pickle of tensors alone, and is not read further") from None
    except (EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no plain pickle of tensors, and is not read further: {reason(error)}"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise CheckpointError(f"{path} holds something else than tensors by name")
    folder = path.parent if out is None else Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    with replacing(folder / VAE_FILE) as partial:
        save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, partial)
    return folder / VAE_FILE
