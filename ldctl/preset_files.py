"""Where presets are: complete runs in one TOML file each, shipped with the package or of the user's own."""

import difflib
import tomllib
from importlib import resources
from pathlib import Path

from ldctl.errors import SpecError


def preset_folder() -> Path:
    """Return the folder of the shipped presets: inside the installed package, or the checkout's."""
    installed = Path(str(resources.files("ldctl"))) / "presets"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "presets"


def preset_names() -> tuple[str, ...]:
    """Return the names of the shipped presets, sorted."""
    return tuple(sorted(path.stem for path in preset_folder().glob("*.toml")))


def preset_training(folder: Path) -> str | None:
    """Return the shipped preset of `ldctl teacher train` whose run is kept in a folder; none where none is."""
    for name in preset_names():
        values = tomllib.loads(find_preset(name).read_text(encoding="utf-8"))
        if "model" in values and values.get("output") == folder.as_posix():
            return name
    return None


def find_preset(name: str) -> Path:
    """Return the file of a preset.

    Args:
        name: A shipped preset's name, or the path of a TOML file.

    Raises:
        SpecError: Neither exists.
    """
    if name in preset_names():
        return preset_folder() / f"{name}.toml"
    if Path(name).is_dir():
        raise SpecError(f"--preset {name}: a folder: give a .toml file in it, or the name of a preset")
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise SpecError(f"--preset {name}: no such file")
        return Path(name)
    near = difflib.get_close_matches(name, preset_names(), n=1)
    hint = f"did you mean {near[0]}? There" if near else "there"
    raise SpecError(f"--preset {name}: no such preset; {hint} are {', '.join(preset_names())}, or give a .toml file")
