"""A Hub on the loopback device: the part of the HTTP interface that huggingface_hub 2.x pushes to and loads from.

Repositories live in memory. `fail` and `cut_uploads` make it misbehave, `stop` unplugs it. Storage is plain LFS:
clients need HF_HUB_DISABLE_XET=1.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

TOKEN = "hf_loopbackTokenThatNobodyMayEverSee"
USER, ORGS = "tester", ("acme",)
LFS = re.compile(r"\.(safetensors|bin|onnx|png|model)$")
REPO = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"  # models of the early days have no owner
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
MODEL_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
LANGUAGE = re.compile(r"^([a-z]{2,3}|code|multilingual)$")


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: list[Commit]
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        oid = self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def add(self, message: str, files: dict[str, bytes]) -> Commit:
        oid = hashlib.sha1(f"{id(self)} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        return self.commits[-1]


@dataclass
class Fault:
    method: str
    path: re.Pattern
    status: int
    body: object
    headers: dict[str, str]
    times: float

    def meets(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method == method and self.path.search(path) is not None


class LoopbackHub(ThreadingHTTPServer):
    """`with LoopbackHub() as hub:` serves at `hub.url`; everything it was asked is in `hub.requests`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.cdn = f"http://localhost:{self.server_address[1]}"  # another host, as far as a client can tell
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.cut_times, self.on_upload, self.stopped = 0, None, False
        self.lock = threading.RLock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self) -> None:
        """Nobody answers at `url` from now on, nor on the connections that are open."""
        if not self.stopped:
            self.stopped = True
            self.shutdown()
            self.server_close()

    def fail(self, method, path, status, body=None, headers=None, times=float("inf")) -> None:
        """Answer requests whose path matches the expression with an error, so many times."""
        self.faults.append(Fault(method, re.compile(path), status, body, headers or {}, times))

    def cut_uploads(self, times: int) -> None:
        """Break the connection of so many uploads after half of the file."""
        self.cut_times = times

    def create(self, repo: str, files: dict[str, bytes] | None = None, private: bool = True) -> Repo:
        self.repos[repo] = Repo(private, [])
        self.repos[repo].add("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return self.repos[repo]

    def count(self, method: str, path: str) -> int:
        """How many requests there were."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)


ROUTES = []


def route(method, path):
    """Register a method of Handler; its parameters are the expression's groups."""

    def register(function):
        ROUTES.append((method, re.compile(f"{path}$"), function))
        return function

    return register


class Refusal(Exception):
    def __init__(self, status, code=None, message="", body=None):
        self.status, self.code, self.message, self.body = status, code, message, body


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1  # an answer is one packet, at once
    server: LoopbackHub

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the client went away, or we did
            super().handle()

    def answer(self, status, body=None, headers=None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def dispatch(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        self.content = b""
        with hub.lock:
            hub.requests.append((self.command, path))
            fault = next((f for f in hub.faults if f.meets(self.command, path)), None)
            if fault:
                fault.times -= 1
        upload = self.command == "PUT" and path.startswith("/lfs/")
        if upload and hub.on_upload:
            hub.on_upload()
        if hub.stopped:
            self.close_connection = True
            return self.connection.close()
        length = int(self.headers.get("Content-Length") or 0)
        if upload and hub.cut_times > 0:
            hub.cut_times -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            return self.connection.close()
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.content = self.read_chunks()
        else:
            self.content = self.rfile.read(length)
        if fault:
            return self.answer(fault.status, fault.body or {"error": "made to fail"}, fault.headers)
        try:
            with hub.lock:
                self.find_route(path)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            if refusal.message:
                headers["X-Error-Message"] = refusal.message
            self.answer(refusal.status, refusal.body or {"error": refusal.message or refusal.code}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def read_chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def find_route(self, path):
        for method, pattern, function in ROUTES:
            match = pattern.match(path)
            if match and (method == self.command or (method == "GET" and self.command == "HEAD")):
                return function(self, **match.groupdict())
        raise Refusal(404, message=f"the loopback Hub has no {self.command} {path}")

    # --- who asks, and for what -------------------------------------------------------------------------------------

    def user(self, needed=True):
        header = self.headers.get("Authorization")
        if header == f"Bearer {TOKEN}":
            return USER
        if header:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        if needed:
            raise Refusal(401, message="Invalid username or password.")
        return None

    def repo_at(self, repo, revision="main", write=False):
        user = self.user(needed=write)
        found = self.server.repos.get(repo)
        if found is None or (found.private and user is None):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        commit = found.at(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found, commit

    @property
    def json(self):
        return json.loads(self.content)

    # --- the interface ----------------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        self.answer(200, {"type": "user", "name": self.user(), "orgs": [{"name": name} for name in ORGS]})

    @route("POST", "/api/repos/create")
    def create_repo(self):
        user, asked = self.user(), self.json
        owner = asked["organization"] or user
        if owner not in (user, *ORGS):
            raise Refusal(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        if name in self.server.repos:
            raise Refusal(
                409, message="You already created this model repo", body={"url": f"{self.server.url}/{name}"}
            )
        self.server.create(name, private=asked.get("visibility") == "private")
        self.answer(200, {"url": f"{self.server.url}/{name}"})

    @route("GET", f"/api/models/{REPO}(/revision/(?P<revision>.+))?")
    def model_info(self, repo, revision):
        found, commit = self.repo_at(repo, revision or "main")
        card = front_matter(commit.files.get("README.md", b"").decode()) or {}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        facts = {"_id": repo, "id": repo, "modelId": repo, "sha": commit.oid, "private": found.private}
        known = {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
        known["evalResults"] = [
            {"filename": path, "data": entry}
            for path, content in commit.files.items()
            if re.fullmatch(r"\.eval_results/[^/]+\.yaml", path)
            for entry in yaml.safe_load(content)
        ]
        self.answer(200, {**facts, **known, "tags": card.get("tags", []), "cardData": card, "siblings": siblings})

    @route("GET", f"/api/models/{REPO}/refs")
    def refs(self, repo):
        found, head = self.repo_at(repo)
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": head.oid}]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in found.tags.items()]
        self.answer(200, {"branches": branches, "converts": [], "tags": tags})

    @route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)")
    def tree(self, repo, revision):
        self.answer(
            200, [self.entry(path, content) for path, content in self.repo_at(repo, revision)[1].files.items()]
        )

    @route("POST", f"/api/models/{REPO}/paths-info/(?P<revision>.+)")
    def paths_info(self, repo, revision):
        files = self.repo_at(repo, revision)[1].files
        asked = parse_qs(self.content.decode())["paths"]
        self.answer(200, [self.entry(path, files[path]) for path in asked if path in files])

    def entry(self, path, content):
        facts = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if LFS.search(path):
            facts["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return facts

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        errors = card_errors(self.json["content"])
        self.answer(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    @route("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)")
    def preupload(self, repo, revision):
        files = self.repo_at(repo, revision, write=True)[1].files
        answers = []
        for asked in self.json["files"]:
            path, mode = asked["path"], "lfs" if LFS.search(asked["path"]) else "regular"
            base64.b64decode(asked["sample"], validate=True)
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in files:
                known = hashlib.sha256(files[path]).hexdigest() if mode == "lfs" else git_hash(files[path])
                answers[-1]["oid"] = known
        self.answer(200, {"files": answers})

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        self.repo_at(repo, write=True)
        objects = []
        for asked in self.json["objects"]:
            objects.append(dict(asked))
            if asked["oid"] not in self.server.blobs:
                upload = {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}
                verify = {"href": f"{self.server.url}/lfs-verify/{asked['oid']}"}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        self.answer(200, {"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, oid):
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise Refusal(400, message="the content does not have the hash that was announced")
        self.server.blobs[oid] = self.content
        self.answer(200)

    @route("POST", "/lfs-verify/(?P<oid>[0-9a-f]{64})")
    def lfs_verify(self, oid):
        if len(self.server.blobs.get(oid, b"")) != self.json["size"]:
            raise Refusal(404, message="no such object")
        self.answer(200)

    @route("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)")
    def commit(self, repo, revision):
        found, head = self.repo_at(repo, revision, write=True)
        lines = [json.loads(line) for line in self.content.splitlines() if line]
        files, message = dict(head.files), lines[0]["value"]["summary"]
        for value, key in ((line["value"], line["key"]) for line in lines[1:]):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, message=f"unknown operation {key}")
        commit = found.add(message, files)
        url = f"{self.server.url}/{repo}/commit/{commit.oid}"
        self.answer(200, {"success": True, "commitOid": commit.oid, "commitUrl": url})

    @route("POST", f"/api/models/{REPO}/tag/(?P<revision>.+)")
    def tag(self, repo, revision):
        found, commit = self.repo_at(repo, revision, write=True)
        if self.json["tag"] in found.tags:
            raise Refusal(409, message="Tag reference exists already")
        found.tags[self.json["tag"]] = commit.oid
        self.answer(200)

    @route("PUT", f"/api/models/{REPO}/settings")
    def settings(self, repo):
        self.repo_at(repo, write=True)[0].private = self.json["visibility"] == "private"
        self.answer(200, {})

    @route("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo, revision, path):
        _, commit = self.repo_at(repo, revision)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content, known = commit.files[path], {"X-Repo-Commit": commit.oid}
        if LFS.search(path):
            sha = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
            return self.answer(302, b"", {**known, **linked, "Location": f"{self.server.cdn}/cdn/{sha}"})
        self.answer(200, content, {**known, "ETag": f'"{git_hash(content)}"', "Content-Length": str(len(content))})

    @route("GET", "/cdn/(?P<sha>[0-9a-f]{64})")
    def cdn(self, sha):
        content = self.server.blobs[sha]
        self.answer(200, content, {"ETag": f'"{sha}"', "Content-Type": "application/octet-stream"})


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def front_matter(card: str) -> dict | None:
    match = re.match(r"---\n(.*?)\n---\n", card, re.S)
    return yaml.safe_load(match.group(1)) if match else None


def card_errors(card: str) -> list[str]:
    """What the Hub refuses in a model card's metadata, as its documentation describes the fields."""
    try:
        facts = front_matter(card)
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(facts, dict):
        return ["no metadata"]
    errors = []
    for key, pattern in {
        "license": r"[a-z0-9.-]+",
        "library_name": r"[\w.-]+",
        "pipeline_tag": r"sentence-similarity|text-ranking",
        "base_model_relation": r"finetune|adapter|quantized|merge",
    }.items():
        if key in facts and not re.fullmatch(pattern, str(facts[key])):
            errors.append(f'"{key}" must match {pattern}')
    for key, pattern in {
        "base_model": MODEL_ID,
        "datasets": HUB_ID,
        "language": LANGUAGE,
    }.items():
        values = facts.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not pattern.match(str(value)):
                errors.append(f'"{key}" must not hold {value!r}')
    if not all(isinstance(tag, str) for tag in facts.get("tags", [])):
        errors.append('"tags" must be strings')
    if "model-index" in facts:
        try:
            model_index_to_eval_results(facts["model-index"])
        except (KeyError, TypeError, AttributeError) as error:
            errors.append(f'"model-index": {error!r}')
    return errors
