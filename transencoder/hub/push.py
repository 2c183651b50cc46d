"""Push models to the Hub, beside the work: what goes wrong there is one line, and the work goes on."""

import dataclasses
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import WeakFileLock, validate_repo_id

from transencoder.config.options import HubArguments, HubTarget, RunTarget
from transencoder.config.recipes import as_options
from transencoder.config.stages import STAGES
from transencoder.errors import InputError
from transencoder.hub.card import (
    EVAL_RESULTS,
    PIPELINES,
    TAG,
    CardContent,
    benchmark_results,
    first_model,
    label_metadata,
    labelled_start,
    portable,
    render_card,
)
from transencoder.model_checks import inspect_encoder
from transencoder.model_files import Kind
from transencoder.run.layout import RECIPE_FILE
from transencoder.runtime.accelerator import log
from transencoder.runtime.files import MODEL_FILES, read_json, sha256, write_json
from transencoder.runtime.records import RUN_FILE

HUB_FILE = "hub.json"  # where a folder's models go
# A repository that holds no more than this is as good as empty.
BLANK = {".gitattributes", "README.md"}


@dataclass
class Version:
    """What a repository holds at one commit: an encoder's files and a card.

    Args:
        content: for the card; `content.model` is the encoder's folder.
        message: of the commit.
        tag: of the commit; None for none.
        files: what lies beside the encoder.
    """

    content: CardContent
    message: str
    tag: str | None = None
    files: list[Path] = field(default_factory=list)

    def write(self, folder: Path, target: HubTarget) -> None:
        """Fill an empty folder with just what the commit holds."""
        for path in sorted(path for pattern in MODEL_FILES for path in self.content.model.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                (folder / path.name).symlink_to(path.resolve())
        for path in self.files:
            shutil.copy(path, folder)
        texts = {"README.md": render_card(self.content, target), RECIPE_FILE: self.content.recipe}
        for name, text in (texts | {EVAL_RESULTS: benchmark_results(self.content)}).items():
            if text:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text, encoding="utf-8")


@dataclass
class Repository:
    """A repository as it should be.

    Args:
        id: ORG/NAME.
        kind: of its encoders.
        tagged: one commit each, in this order.
        main: what `main` is at in the end.
    """

    id: str
    kind: Kind
    tagged: list[Version]
    main: Version


# --- where to --------------------------------------------------------------------------------------------------------


def check_target(target: HubTarget) -> None:
    """Raise `InputError` for a name that no repository can have."""
    name = target.hub_model_id or ""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {name}: {error}") from error
    if "/" not in name:
        raise InputError(f"--hub_model_id {name}: must be ORG/NAME, with a user's or an organization's name before it")


def check_hub(arguments: HubArguments) -> None:
    """Raise `InputError` for a stage's flags that do not go together."""
    if bool(arguments.push_to_hub) != bool(arguments.hub_model_id):
        raise InputError("--push_to_hub and --hub_model_id ORG/NAME go together")
    if arguments.push_to_hub:
        check_target(arguments)


def remember(folder: Path, target: HubTarget) -> None:
    """Note in a folder where its models go, so that they can be pushed later."""
    names = [f.name for f in dataclasses.fields(RunTarget) if hasattr(target, f.name)]
    write_json(folder / HUB_FILE, {name: getattr(target, name) for name in names})


def recall(folder: Path) -> RunTarget | None:
    """Return what `remember` noted, if anything.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / HUB_FILE
    if not path.is_file():
        return None
    try:
        return RunTarget(**read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


# --- pushing ---------------------------------------------------------------------------------------------------------


def push(folder: Path, repositories: list[Repository], target: HubTarget) -> bool:
    """Push whatever is not there yet; one line about each repository that could not be brought up to date.

    Args:
        folder: the run or the stage's output, for the command that pushes later.
    Returns:
        Whether everything is there now.
    """
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    done = True
    with WeakFileLock(folder / ".push.lock"):
        for repository in repositories:
            try:
                push_repository(HfApi(), repository, target)
            except Exception as error:  # the client and its HTTP and storage libraries raise dozens of types
                log(f"Not pushed to {repository.id}: {reason(error)}")
                done = False
    if not done:
        log(f"The models are in {folder}; to push later: python scripts/push_to_hub.py {shlex.quote(str(folder))}")
    return done


def push_repository(api: HfApi, repository: Repository, target: HubTarget) -> None:
    """Make the repository where it is missing, add the commits whose tags it lacks, and bring `main` to its end."""
    claim_repository(api, repository, target)
    there = {tag.name for tag in api.list_repo_refs(repository.id).tags}
    for version in repository.tagged:
        if version.tag in there:
            check_same(api, repository, version)
        else:
            commit = upload(api, repository, version, target)
            api.create_tag(repository.id, tag=version.tag, revision=commit, exist_ok=True)
            log(f"Pushed {version.message} to {repository.id}, tag {version.tag}")
    before = api.model_info(repository.id).sha
    if upload(api, repository, repository.main, target) != before:
        log(f"Pushed {repository.main.message} to {repository.id}, main")


def claim_repository(api: HfApi, repository: Repository, target: HubTarget) -> None:
    """Make the repository, or see that the one that is there is of this kind.

    Raises:
        InputError: it holds something else, which must not be overwritten.
    """
    api.create_repo(repository.id, private=not target.hub_public, exist_ok=True)
    info = api.model_info(repository.id)
    ours = TAG in (info.tags or []) and info.pipeline_tag == PIPELINES[repository.kind]
    if {file.rfilename for file in info.siblings or []} - BLANK and not ours:
        raise InputError(
            f"it exists and holds something else than {repository.kind}-encoders of this tool; choose another name"
        )
    if target.hub_public and info.private:
        api.update_repo_settings(repository.id, private=False)


def check_same(api: HfApi, repository: Repository, version: Version) -> None:
    """Raise `InputError` if the tag's weights are others: a tag that people may have used does not move."""
    weights = {path.name: sha256(path) for path in version.content.model.glob("model*.safetensors")}
    there = api.get_paths_info(repository.id, list(weights), revision=version.tag)
    if {file.path: file.lfs and file.lfs.sha256 for file in there} != weights:
        raise InputError(
            f"its tag {version.tag} holds other weights than {version.content.model}; choose another name, or delete "
            "the tag"
        )


def upload(api: HfApi, repository: Repository, version: Version, target: HubTarget) -> str:
    """Make `main` hold just this version; the commit, which is the one there was if nothing had to change."""
    with tempfile.TemporaryDirectory() as folder:
        version.write(Path(folder), target)
        return api.upload_folder(
            repo_id=repository.id, folder_path=folder, commit_message=version.message, delete_patterns="*"
        ).oid


def reason(error: Exception) -> str:
    """Say what went wrong in one line; without the token, should a server have repeated it."""
    text = str(error)
    if not isinstance(error, InputError | HfHubHTTPError):  # whose text says it all
        text = f"{type(error).__name__}: {error}" + (f" ({error.__cause__})" if error.__cause__ else "")
    text = " ".join(text.split())
    token = huggingface_hub.get_token()
    return text.replace(token, "***") if token else text


# --- a single stage --------------------------------------------------------------------------------------------------


def push_stage(arguments: HubArguments) -> None:
    """Push a training stage's result, if that was asked for."""
    if arguments.push_to_hub:
        folder = Path(arguments.output_dir)
        remember(folder, arguments)
        push(folder, [stage_repository(folder, arguments)], arguments)


def stage_repository(folder: Path, target: HubTarget) -> Repository:
    """Return the repository of a single stage's model.

    Raises:
        InputError: the folder's run.json is not that of a training stage.
    """
    try:
        run = read_json(folder / RUN_FILE)
        known = {"model_name_or_path", "seed"} <= run["arguments"].keys() and run["stage"] in STAGES
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        known = False
    if not known:
        raise InputError(f"{folder}: its {RUN_FILE} is not that of a training stage")
    defaults = {f.name: f.default for f in dataclasses.fields(STAGES[run["stage"]].arguments)}
    given = {name: value for name, value in run["arguments"].items() if value != defaults.get(name)}
    given.pop("inputs", None)
    given = portable(given)
    command = f"accelerate launch scripts/{run['stage']}.py {shlex.join(as_options(given))} --output_dir {folder.name}"
    kind = inspect_encoder(str(folder))
    base = first_model(run["arguments"]["model_name_or_path"])
    content = CardContent(target.hub_model_id, folder, kind, base, command)
    teachers = label_metadata(folder, run["arguments"]).get("encoders", [])
    content.labelled = labelled_start([str(folder), *teachers])
    version = Version(content, f"{run['stage']}, seed {run['arguments']['seed']}")
    return Repository(target.hub_model_id, kind, [], version)
