"""The optional packages: which extra brings which, what is installed, and the error for what is not."""

import importlib.metadata
import importlib.util

# Import name of each optional package, and the extra that installs it.
EXTRA_OF = {
    "tokenizers": "demo",
    "rich": "demo",
    "matplotlib": "demo",
    "timm": "timm",
    "open_clip": "open-clip",
    "transformers": "transformers",
    "peft": "peft",
}


def version_of(module: str) -> str | None:
    """Version of an importable package, found without importing it; None if it is missing."""
    if importlib.util.find_spec(module) is None:
        return None
    # Asked by import name: distributions are renamed and repackaged (open_clip_torch, pytorch-triton), modules are not.
    distributions = importlib.metadata.packages_distributions().get(module)
    return importlib.metadata.version(distributions[0]) if distributions else "not installed by a package manager"


def install_hint(*modules: str) -> str:
    """The shell command that installs these optional packages."""
    return _install(*(EXTRA_OF[module] for module in modules))


def _install(*extras: str) -> str:
    return f"pip install 'bigclass[{','.join(sorted(set(extras)))}]'"


def require(*modules: str, extra: str | None = None) -> None:
    """Check that optional packages are importable. extra: the extra to name where it is not the packages' usual one.

    Raises:
        ModuleNotFoundError: naming the packages that are missing and the command that installs them.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        hint = _install(extra) if extra else install_hint(*missing)
        raise ModuleNotFoundError(f"needs {', '.join(missing)}, not installed here: run {hint}", name=missing[0])
