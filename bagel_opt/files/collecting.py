"""The tensors of a folder or a file in any layout that we read, by their published names."""

from dataclasses import dataclass, field
from pathlib import Path

from bagel_opt.errors import CheckpointError
from bagel_opt.files import veomni
from bagel_opt.files.comfyui import read_notes
from bagel_opt.files.dfloat11 import Part, find_parts, piece_of
from bagel_opt.files.finding import VAE_FILE, check_layout, dfloat11_config, quantized_parts, transformer_files
from bagel_opt.files.weights import Location, read_header


@dataclass
class Weights:
    """Where tensors are. Their names are the published ones; the VAE's begin with "vae."."""

    tensors: dict[str, Location] = field(default_factory=dict)
    places: dict[str, tuple[Path, str] | Part] = field(default_factory=dict)  # a file, and the name there
    given: dict[str, dict] = field(default_factory=dict)  # JSON files by name that came with them
    comfyui: dict[Path, dict] = field(default_factory=dict)  # what files for ComfyUI say
    notes: list[str] = field(default_factory=list)  # which of several files were chosen, for the user
    kinds: dict[str, str] = field(default_factory=dict)  # of the parts that are quantised

    def over(self, other: "Weights") -> "Weights":
        """These, and of the other those that are not here."""
        found = (getattr(other, name) | getattr(self, name) for name in ("tensors", "places", "given", "comfyui"))
        return Weights(*found, other.notes + self.notes, self.kinds)

    def add(self, name: str, place: tuple[Path, str] | Part, at: Location) -> None:
        """Raises CheckpointError where it is there already."""
        if name in self.places:
            one, two = (found.path if isinstance(found, Part) else found[0] for found in (place, self.places[name]))
            raise CheckpointError(f"{one} and {two.name} both have tensor {name:.200}")
        self.places[name], self.tensors[name] = place, at


def collect(place: Path, needed: bool = True) -> Weights:
    """Reads headers, JSON and DFloat11's tables. needed: whether there must be tensors of a transformer. Raises
    FileNotFoundError and CheckpointError."""
    folder = place.parent if place.is_file() else place
    found, pieces = Weights(kinds=quantized_parts(folder)), Weights()
    modules = veomni.modules(place)
    for path in [path for folder in modules or [place] for path in _files(folder, needed, found.notes)]:
        if not path.is_file():
            if not needed:  # an index that was copied along
                continue
            raise FileNotFoundError(f"{path} is missing; copy the whole checkpoint there")
        tensors, notes = read_header(path, CheckpointError)
        check_layout(path, tensors, scales=bool(found.kinds))
        if (said := read_notes(path, notes)) is not None:
            found.comfyui[path] = said
            found.given |= said["model_configs"]
        for name, at in tensors.items():
            if piece_of(name):
                pieces.add(name, (path, name), at)
            elif modules:
                found.add(veomni.published_name(name), (path, name), at)
            else:
                found.add(f"vae.{name}" if path.name == VAE_FILE else name, (path, name), at)
    found.given |= veomni.configs(place)
    groups = {name: (pieces.places[name][0], at) for name, at in pieces.tensors.items()}
    for name, part in find_parts(groups, dfloat11_config(folder), folder / "config.json").items():
        found.add(name, part, part.location)
    return found


def _files(place: Path, needed: bool, notes: list[str]) -> list[Path]:
    try:
        files, others = transformer_files(place)
    except FileNotFoundError:
        if needed:
            raise
        files, others = [], []
    if others:
        named = ", ".join(path.name for path in others)
        notes.append(f"taking {files[0].name} of {place}; there is {named} too, which weights={others[0]} would take")
    return [*files, *(path for path in [place / VAE_FILE] if path.is_file())]


def beside(path: Path) -> Weights:
    """What goes with a file that is named in place of a folder: the VAE in its folder, if there is one."""
    vae = path.parent / VAE_FILE
    return collect(vae) if path.is_file() and path != vae and vae.is_file() else Weights()
