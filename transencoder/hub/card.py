"""Model cards: what a model is, how it does, and how exactly it was made, from what a run left on disk."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import huggingface_hub
import pyarrow.parquet as pq
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, HfApi, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

import transencoder
from transencoder.config.options import HubTarget
from transencoder.config.stages import STAGES
from transencoder.data.paper import published
from transencoder.data.pools import DATA_OPTIONS, MODEL_OPTIONS
from transencoder.data.scores import read_metadata
from transencoder.data.tables import is_hub_id
from transencoder.data.tasks import TASKS, split_name, title
from transencoder.errors import InputError
from transencoder.evaluation import METRICS, PRIMARY, markdown_table, origin, shown_value
from transencoder.model_checks import inspect_encoder
from transencoder.model_files import Kind, plain_pooling
from transencoder.runtime.files import read_json
from transencoder.runtime.records import RUN_FILE

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
EVAL_RESULTS = ".eval_results/trans-encoder.yaml"
TAG = "trans-encoder"  # by which a repository is known as one of ours
PIPELINES = {"bi": "sentence-similarity", "cross": "text-ranking"}
OWN_TAGS = {"bi": ["sentence-similarity", "feature-extraction"], "cross": ["cross-encoder", "text-ranking"]}
PLACEHOLDER = "path/to/"  # of what others do not have
EXAMPLES = Path(transencoder.__file__).resolve().parents[1] / "examples"  # files that others have, too
# The keys of recipes and the options that name models, and all that name what lies on a disk.
MODEL_KEYS = {*MODEL_OPTIONS, "plm", "bi_encoder", "cross_encoder_plm", "model"}
PATH_KEYS = {*MODEL_KEYS, *DATA_OPTIONS, "data_dir"}
NOT_SHOWN = {*PATH_KEYS, "inputs", "columns", "seed"}  # of run.json's arguments: paths, or said elsewhere in the card
SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})")
CARRIED = ("license", "license_name", "license_link", "language")


@dataclass
class CardContent:
    """Hold what a card says beyond what the model's own folder does.

    Args:
        repo: ORG/NAME.
        model: the folder, with run.json.
        kind: of encoder.
        base: the model at the beginning of it all: Hub id or folder.
        labelled: a model at its beginning into which labels may have gone; None where there is none.
        command: makes the model again.
        results: this encoder's entries of results.json.
        start: those of the start, to compare with.
        paper: row of the paper's tables to compare with, if there is one.
        verdict: what it is against its start, and what follows; Markdown, the first line.
        note: which of the results are not for comparing, and why.
        lineage: Markdown about the run's cycles, and which of them this is.
        plot: whether progress.png is beside the card.
        published: end of an encoder's path in the run -> how it is called on the Hub.
        recipe: for the command, as YAML.
    """

    repo: str
    model: Path
    kind: Kind
    base: str
    command: str
    results: list[dict[str, Any]] = field(default_factory=list)
    start: list[dict[str, Any]] = field(default_factory=list)
    paper: str | None = None
    labelled: str | None = None
    verdict: str = ""
    note: str = ""
    lineage: str = ""
    plot: bool = False
    published: dict[str, str] = field(default_factory=dict)
    recipe: str = ""

    @property
    def name(self) -> str:
        """Return the name of the repository without ORG."""
        return self.repo.rpartition("/")[2]


def render_card(content: CardContent, target: HubTarget) -> str:
    """Return the card as Markdown with its metadata.

    Args:
        target: with the licence and language that were asked for; else the base model's are carried over.
    """
    run = json.loads((content.model / RUN_FILE).read_text(encoding="utf-8"))
    labels = label_metadata(content.model, run["arguments"])
    tokenizer = json.loads((content.model / "tokenizer_config.json").read_text(encoding="utf-8"))
    data = card_data(content, target, run["arguments"], labels)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo=content.repo,
        kind=content.kind,
        title=content.name,
        base=model_name(content.base),
        labelled=content.labelled and model_name(content.labelled),
        verdict=content.verdict,
        pooling=plain_pooling(str(content.model)) if content.kind == "bi" else None,
        max_length=tokenizer["model_max_length"],
        results_table=results_table(content),
        measures=" or ".join(dict.fromkeys(METRICS[entry["metric"]].card for entry in primary(content.results))),
        note=content.note,
        origin=origin(content.results),
        method=method_of(run),
        making=making(content, run, labels),
        lineage=content.lineage,
        plot=content.plot,
        command=content.command,
        placeholders=PLACEHOLDER in content.command + content.recipe,
        options=options_table(run),
        seed=run["arguments"]["seed"],
        versions=", ".join(f"{module} {version}" for module, version in run["versions"].items()),
        licence=data.license,
        implementation=transencoder.__version__,
    )
    return str(card)


def method_of(run: dict[str, Any]) -> str:
    """Return the sentence about how a stage trains, with the words of what was chosen from registries."""
    stage = STAGES[run["stage"]]
    chosen = {
        option.name: resolve_name(option.metadata["choices"])[name].card
        for option in dataclasses.fields(stage.arguments)
        if option.metadata["choices"] and (name := run["arguments"].get(option.name, option.default))
    }
    return stage.card.format(**chosen)


def card_data(
    content: CardContent, target: HubTarget, arguments: dict[str, Any], labels: dict[str, Any]
) -> ModelCardData:
    """Return the metadata that the Hub understands."""
    mutual = len(labels.get("encoders", [])) > 1
    taught = [] if not labels else ["mutual-distillation" if mutual else "self-distillation"]
    unlabelled = [] if content.labelled else ["unsupervised"]
    base, _ = hub_origin(content.base)
    measured = [entry for entry in content.results if entry["value"] is not None]
    used = [source for source in sources_of(arguments, labels) if is_hub_id(source)]
    used += [TASKS[entry["task"]].hub_id for entry in measured if entry["task"] in TASKS]
    known = base_metadata(content.base)
    if target.hub_license:
        known = {key: value for key, value in known.items() if not key.startswith("license")}
        known["license"] = target.hub_license
    if target.hub_language:
        known["language"] = target.hub_language.split(",")
    if base:
        known |= {"base_model": base, "base_model_relation": "finetune"}
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag=PIPELINES[content.kind],
        tags=[TAG, *unlabelled, *taught, "sentence-transformers", *OWN_TAGS[content.kind]],
        datasets=list(dict.fromkeys(used)) or None,
        metrics=list(dict.fromkeys(METRICS[entry["metric"]].hub_name for entry in measured)) or None,
        model_name=content.name,
        eval_results=[eval_result(entry) for entry in measured] or None,
        **known,
    )


def eval_result(entry: dict[str, Any]) -> EvalResult:
    """Return an entry of results.json in the form of the Hub's model-index."""
    source = TASKS.get(entry["task"])
    if source and dict(source.rows).get(entry["split"]) not in (None, entry["n"]):
        source = None  # a part of the set, or another sample, which must not stand among the results on the whole
    metric = METRICS[entry["metric"]]
    graded = metric.gold == "score"
    return EvalResult(
        task_type="semantic-similarity" if graded else "binary-classification",
        task_name="Semantic Similarity" if graded else "Paraphrase or entailment of a pair",
        dataset_type=source.hub_id if source else entry["task"],
        dataset_name=title(entry["task"], entry["split"]),
        dataset_config=source.config if source else None,
        dataset_split=entry["split"],
        dataset_revision=source.revision if source else None,
        metric_type=metric.hub_name,
        metric_name=metric.card,
        metric_value=round(entry["value"], 4),
    )


def benchmark_results(content: CardContent) -> str:
    """Return the YAML of the Hub's `.eval_results`: whole benchmarks that are registered there; empty without any."""
    sources = [(entry, TASKS.get(entry["task"])) for entry in primary(content.results) if entry["split"] == "test"]
    entries = [
        EvalResultEntry(
            dataset_id=source.hub_id,
            task_id=source.benchmark,
            value=round(entry["value"], 4),
            dataset_revision=source.revision,
            notes=f"{METRICS[entry['metric']].card} of a {content.kind}-encoder. {content.note}".strip(),
        )
        for entry, source in sources
        if source and source.benchmark and entry["n"] == dict(source.rows)["test"] and entry["value"] is not None
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""


def results_table(content: CardContent) -> str:
    """Return a table with a row for each set: start, this model, paper if it has a figure; empty without results."""
    start = {title(entry["task"], entry["split"]): entry["value"] for entry in primary(content.start)}
    names = [title(entry["task"], entry["split"]) for entry in primary(content.results)]
    paper = [published(name, content.paper) if content.paper else None for name in names]
    header = ["set", "pairs", *(["start"] if start else []), "this model", *(["paper"] if any(paper) else [])]
    rows = []
    for name, entry, figure in zip(names, primary(content.results), paper, strict=True):
        before = [shown_value(start.get(name))] if start else []
        after = [shown_value(figure)] if any(paper) else []
        rows.append([name, f"{entry['n']:,}", *before, shown_value(entry["value"]), *after])
    return markdown_table(header, rows) if rows else ""


def primary(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of the metrics that tables show."""
    return [entry for entry in entries if entry["metric"] in PRIMARY]


def making(content: CardContent, run: dict[str, Any], labels: dict[str, Any]) -> list[str]:
    """Return lines about the model's start, its teachers, its data and the checkpoint that was kept."""
    arguments = run["arguments"]
    lines = [f"Start: {called(arguments['model_name_or_path'], content)}"]
    teachers = labels.get("encoders", [])
    if arguments.get("teacher"):
        lines.append(f"Teacher: {called(arguments['teacher'], content)}")
    for teacher in teachers:
        lines.append(f"Teacher: {called(teacher, content)}{_checksum(labels.get('inputs', {}).get(teacher))}")
    if len(teachers) > 1:
        weights = (labels.get("teacher_weights") or [])[: len(teachers)]
        weighted = f", with the weights {', '.join(map(str, weights))}" if weights else ""
        lines.append(f"It learned the teachers' mean score{weighted} (mutual distillation).")
    for path in labels.get("scores") or []:
        lines.append(f"Another teacher's scores: `{Path(path).name}`")
    if labels.get("lexical_weight"):
        lines.append(f"The sentences' common words had the weight {labels['lexical_weight']} in the score.")
    if near := labels.get("smooth_neighbours"):
        lines.append(f"Bi-encoders' scores compared neighbourhoods: each sentence's {near} nearest in the data.")
    if share := arguments.get("drop_disagreement"):
        lines.append(f"The {100 * share:g} % of the pairs on which its teachers disagreed most were left out.")
    if arguments.get("weight_disagreement"):
        lines.append("It saw a pair the more often the better its teachers agreed on it: from twice to not at all.")
    if labels.get("both_orders") and run["stage"] == "distill_cross2bi":
        lines.append("Cross-encoders scored (a, b) and (b, a), and the mean counts; the paper scores (a, b) only.")
    noted = (labels or arguments).get("inputs", {})
    sources = ", ".join(
        f"`{_shown(name)}`{_checksum(noted.get(name) or noted.get(split_name(name)[1]))}"
        + _mined_from(name, content.model)
        for name in sources_of(arguments, labels)
    )
    seen = f"{run['examples']:,} {'examples' if labels else 'distinct sentences'}"
    if labels.get("rows"):
        seen = f"{labels['rows']:,} distinct pairs"
    lines.append(f"Data: {seen}, without labels, from {sources}")
    kept, processes = f"Checkpoint: step {run['kept_step']} of {run['steps']}", run["world_size"]
    if "dev" in run:
        kept += f", the best on `{_shown(arguments['dev'])}` ({_metric(run['dev_metric'])} {run['dev']:.2f})"
    elif "agreement" in run:
        kept += f", which agreed most with the teachers ({_metric(run['agreement_metric'])} {run['agreement']:.2f})"
    processes = f"{processes} process{'es' if processes > 1 else ''}"
    lines.append(f"{kept}; {processes}, mixed precision {run['mixed_precision']}")
    if merged := run.get("merged_with_start"):
        by = {"dev": ", the mixture that was best on the dev set"}
        by["agreement"] = ", the mixture that agreed most with the teachers"
        share, how = merged["share"], by.get(merged.get("by"), "")
        lines.append(f"Weights: {1 - share:g} x the start's + {share:g} x the trained ones{how}")
    return lines


def called(name: str, content: CardContent) -> str:
    """Return how a card names an encoder: its repository, its Hub id and revision, or the last part of its path."""
    for end, on_the_hub in content.published.items():
        if name.endswith(end):
            return on_the_hub
    revision = hub_origin(name)[1]
    return f"`{model_name(name)}`" + (f" at revision `{revision}`" if revision else "")


def _checksum(noted: str | dict[str, str] | None) -> str:
    """Return what run.json noted of an input, in brackets: a file's checksum, those of a model's weights, a commit."""
    if isinstance(noted, dict):
        noted = "`, `".join(sum_ for name, sum_ in noted.items() if name.endswith(".safetensors"))
    if not noted:
        return ""
    return f" ({noted})" if noted.startswith("commit ") else f" (SHA-256 `{noted}`)"


def _mined_from(name: str, model: Path) -> str:
    """Return ", mined from `sentences.txt`" for pairs of `mine_pairs`; their file may have moved with the run."""
    path = next((path for path in (Path(name), model.parents[1] / Path(name).name) if path.is_file()), None)
    metadata = (read_metadata(path) or {}) if path and path.suffix == ".parquet" else {}
    sentences = [f"`{_shown(source)}`" for source in metadata.get("sentences") or []]
    return f", mined from {' and '.join(sentences)}" if sentences else ""


def _metric(name: str) -> str:
    return METRICS[name].card.removesuffix(" x 100") if name in METRICS else name


def _shown(name: str) -> str:
    """Return a Hub id or task as it is, and only the name of a file or folder."""
    path = name.rpartition("=")[2]
    return name if path == name and is_hub_id(name) else Path(path).name


def first_model(name: str, or_teacher: bool = False) -> str:
    """Return the model that one of ours goes back to, start by start; a model that is not ours goes back to itself.

    Args:
        or_teacher: go back to the teacher of step 1, where it had one.
    """
    try:
        arguments = read_json(Path(name) / RUN_FILE)["arguments"]
        teacher = arguments.get("teacher") if or_teacher else None
        return first_model(teacher or arguments["model_name_or_path"], or_teacher)
    except (OSError, ValueError, KeyError, TypeError):
        return name


def labelled_start(names: list[str]) -> str | None:
    """Return the first of these models that goes back to an encoder, not to a language model: labels may be in it."""
    for name in names:
        try:
            if inspect_encoder(first_model(name, or_teacher=True)) != "plm":
                return first_model(name, or_teacher=True)
        except InputError:  # it is not here any more, and nothing is known of it
            return first_model(name, or_teacher=True)
    return None


def model_name(name: str) -> str:
    """Return what people call a model: its Hub id, the title of its own card, or the name of its folder."""
    return hub_origin(name)[0] or _own_card(name)[0] or Path(name).name


def _own_card(name: str) -> tuple[str | None, str | None]:
    """Return the title of the card in a model's folder, and the Hub id of that name which its code loads."""
    card = Path(name) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    title = re.search(r"(?m)^# *(\S.*?)\s*$", text)
    hub_id = title and re.search(rf"""["']([\w-]+/{re.escape(title[1])})["']""", text)
    return title and title[1], hub_id and hub_id[1]


def portable(value: Any, key: str = "") -> Any:
    """Return a recipe, or options, as they are good on another machine.

    A folder of a model becomes its Hub id where that is known. Of what else lies on this machine alone, a placeholder
    with its last part is left; the bundled examples are everywhere.
    """
    if isinstance(value, dict):
        return {name: portable(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [portable(item, key) for item in value]
    if key not in PATH_KEYS or not isinstance(value, str):
        return value
    name, path = split_name(value)
    here, bundled, found = Path(path), (EXAMPLES.parent / path).resolve(), None
    if key in MODEL_KEYS:
        found = hub_origin(path)[0]
    elif bundled.is_relative_to(EXAMPLES) and bundled.is_file():
        found = str(bundled.relative_to(EXAMPLES.parent))
    elif not (here.is_absolute() or here.is_file() or key == "data_dir"):
        return value
    return (f"{name}=" if name else "") + (found or PLACEHOLDER + here.name)


def hub_origin(name: str) -> tuple[str | None, str | None]:
    """Return Hub id and revision of an encoder that came from there; the cache knows the revision that was used.

    A name that is no path here may be a folder of another machine or working directory, so the Hub is asked. A folder
    outside the cache may hold a card that names its id.
    """
    path = Path(name)
    if not path.exists():
        try:
            cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None, None
        if isinstance(cached, str):
            return name, Path(cached).parent.name
        return (name, None) if HfApi().repo_exists(name) else (None, None)
    snapshot = SNAPSHOT.search(str(path.absolute()))
    return (f"{snapshot[1]}/{snapshot[2]}", snapshot[3]) if snapshot else (_own_card(name)[1], None)


def base_metadata(base: str) -> dict[str, Any]:
    """Return licence and language as the base model's card has them; empty if it has no card."""
    try:
        card = ModelCard.load(Path(base) / "README.md" if Path(base).is_dir() else base)
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError, OSError, ValueError):
        return {}
    found = card.data.to_dict()
    return {key: found[key] for key in CARRIED if found.get(key)}


def label_metadata(model: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return who gave a student's labels, from the score file's metadata, and `rows`; empty for step 1.

    The file is looked for where it was, where --teachers leave it, and where the driver puts it (the run may have
    moved).
    """
    if "scores" not in arguments:
        return {}
    places = [model / "teacher-scores.parquet"]
    if not arguments.get("teachers"):
        (scores,) = scores_of(arguments)
        places = [model.parents[1] / Path(scores).name, Path(scores)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return {"rows": 0, "encoders": arguments.get("teachers") or []}
    if path.suffix != ".parquet":  # somebody's own scores say nothing of where they come from
        return {"rows": 0, "encoders": []}
    return {**(read_metadata(path) or {}), "rows": pq.read_metadata(path).num_rows}


def sources_of(arguments: dict[str, Any], labels: dict[str, Any]) -> list[str]:
    """Return the files and Hub ids of the training text."""
    named = labels.get("pairs") or arguments.get("pairs") if labels else arguments["sentences"]
    return named or scores_of(arguments)


def scores_of(arguments: dict[str, Any]) -> list[str]:
    """Return the files of a student's --scores; a run of before has a single name there."""
    scores = arguments["scores"]
    return [scores] if isinstance(scores, str) else scores


def options_table(run: dict[str, Any]) -> str:
    """Return a table of the stage's options, without paths; `swap` is what the pairs decided."""
    options = run["arguments"] | ({"swap": run["swap"]} if "swap" in run else {})
    rows = [[f"`{name}`", str(value)] for name, value in options.items() if name not in NOT_SHOWN]
    return markdown_table(["option", "value"], [row for row in rows if row[1] != "None"])
