"""A package of a model, as an installer leaves it: what `importlib.metadata` reads, and nothing of a registry."""

from pathlib import Path


def install(folder: Path, name: str, *files: str) -> None:
    """Put a package with these files into a folder, which `sys.path` has or will have. Files that are there stay."""
    about = f"{name.replace('-', '_')}-0.0.dist-info"
    for file in (*files, f"{about}/METADATA", f"{about}/RECORD"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0\n")
    (folder / about / "RECORD").write_text("".join(f"{file},,\n" for file in files))
