"""Where what a setting names lies: a path, the shipped pipeline, or a repository of the Hugging
Face hub, fetched or read from its cache.
"""

from pathlib import Path

from fluxlite.cli.options import expand_home

TINY = "flux-tiny"
ASSETS = Path(__file__).parents[3] / "assets"
MODEL_SUFFIXES = ".safetensors", ".gguf"  # of files that a repository's name may end with


def resolve_tiny(path):
    """`flux-tiny` names the pipeline that comes with the code; anything else stands for itself."""
    if path != TINY:
        return path
    if not (ASSETS / TINY).is_dir():
        raise ValueError(
            f"{ASSETS / TINY} is missing: work in a clone of the repository, or name a checkpoint "
            "of your own"
        )
    return str(ASSETS / TINY)


def local_path(where, patterns, *, setting="model.checkpoint"):
    """The path `where`, or where the files of a hub repository that match have been fetched to;
    `flux-tiny` is the shipped pipeline.
    """
    path = Path(expand_home(resolve_tiny(str(where)), setting))
    if path.exists():
        return path
    if not is_repository(str(where)):
        raise ValueError(f"{setting}={where} does not exist")
    return fetch_repository(str(where), patterns, key=setting)


def is_repository(where):
    """Whether `where` reads as `owner/name[/folder…]` of the hub rather than as a path."""
    owner, slash, rest = str(where).partition("/")
    return (
        bool(slash and owner and rest.strip("/"))
        and owner[0] not in ".~"
        and not Path(owner).is_dir()
    )


def is_pipeline(where):
    """Whether `where` reads as a repository or a folder of one, and not as a file there."""
    return is_repository(where) and not str(where).endswith(MODEL_SUFFIXES)


def fetch_repository(where, patterns, *, key):
    """The local folder of the hub repository `owner/name[/folder…]` with the files in that folder
    that match `patterns`; of `owner/name[/folder…]/x.safetensors` or `.gguf` that file.

    Raises `ValueError`, within seconds where the hub is out of reach; `key` is the setting that
    names the repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        owner, name, *inside = str(where).strip("/").split("/")
        patterns = ["/".join([*inside, pattern]) for pattern in patterns]
        if inside and inside[-1].endswith(MODEL_SUFFIXES):
            patterns = ["/".join(inside)]
        return Path(
            snapshot_download(f"{owner}/{name}", allow_patterns=patterns, etag_timeout=5)
        ).joinpath(*inside)
    except GatedRepoError as error:
        remedy = (
            f"is gated: accept its licence at https://huggingface.co/{where}, then run `hf "
            "auth login` or set HF_TOKEN"
        )
        raise ValueError(f"{key}={where} {remedy}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{key}={where} is no folder and no public hub repository: check the name, or `hf auth "
            "login`"
        ) from error
    except OSError as error:
        remedy = "name a folder, such as assets/flux-tiny, or check the connection"
        raise ValueError(
            f"{key}={where} is no folder, and the hub does not answer ({first_line(error)}): "
            f"{remedy}"
        ) from error


def first_line(error):
    """The first line of an error's text, shortened."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 160 else line[:157] + "..."
