"""A small hub on the loopback interface, which speaks as much of huggingface.co's protocol as its Python clients use:
repository information, trees, files with ranges, large files by redirect, uploads without Xet; and which can fail in the
ways a hub fails."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".parquet")
REPO = r"/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
UPLOADS = r"/api/(?P<what>repos/create|validate-yaml)|/api/models/(?P<repo>[^/]+/[^/]+)/(?P<step>preupload|commit)/main"
UPLOADS += r"|/(?P<batch>[^/]+/[^/]+)\.git/info/lfs/objects/batch"


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """with Hub({"owner/name": {"config.json": b"{}"}}) as hub: ... HF_ENDPOINT=hub.url

    cut: {file name: bytes after which its transfer breaks off}, once for each. swap: {file name: what is sent instead}.
    refuse: {repository: (status, the hub's error code)} for all its requests; in refuse_files for its files only, in
    refuse_storage where these are redirected to. refusals: how many requests are refused so; None: all.
    pause: seconds between pieces of 64 KB. requests: (method, path, range) of all that was asked; authorizations: (path,
    header).
    users: {token: what /api/whoami-v2 says of its owner}; who is there may create repositories under that name and upload.
    private: repositories that were created so. breaks: how many uploads of large files break off in the middle.
    """

    def __init__(self, models: dict, datasets: dict | None = None):
        self.repos = {"models": models, "datasets": datasets or {}}
        self.cut, self.swap, self.tokens = {}, {}, {}
        self.refuse, self.refuse_files, self.refuse_storage, self.refusals = {}, {}, {}, None
        self.revisions = {"main"}
        self.pause, self.requests, self.authorizations = 0.0, [], []
        self.users, self.private, self.breaks, self.uploaded = {}, set(), 0, {}

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()

    def fetched(self) -> list[str]:
        """Names of the files of which something was sent."""
        asked = [path for method, path, _ in self.requests if method == "GET" and not path.startswith("/api")]
        return [path.rsplit("/", 1)[1] for path in asked if path.startswith("/large") or not path.endswith(LARGE)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.hub.authorizations.append((path, self.headers.get("Authorization")))
        if path.startswith("/upload/"):
            return self.store(path.removeprefix("/upload/"))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/whoami-v2":
            return self.send_json(self.user()) if self.user() else self.refuse(401, "")
        if found := re.fullmatch(UPLOADS, path):
            return self.upload(body, **found.groupdict())
        if found := re.fullmatch(rf"/large{REPO}/(?P<file>.+)", path):
            if (refused := self.hub.refuse_storage.get(found["repo"])) and self.still():
                return self.refuse(*refused)
            return self.send_file(self.hub.repos[found["kind"]][found["repo"]], found["file"])
        kind = "models"
        if path.startswith("/datasets/"):
            kind, path = "datasets", path.removeprefix("/datasets")
        if found := re.fullmatch(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
            return self.resolve(kind, **found.groupdict())
        if found := re.fullmatch(
            rf"/api{REPO}(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<sub>.*))?)?", path
        ):
            return self.api(found, parse_qs(url.query), body)
        return self.refuse(404, "EntryNotFound")

    def known(self, kind, repo, revision, of_files=False) -> bool:
        """Whether repository and revision are there for who asks; answers with the hub's errors otherwise."""
        refused = self.hub.refuse.get(repo) or (of_files and self.hub.refuse_files.get(repo))
        token = self.hub.tokens.get(repo)
        if refused and not (token and self.headers.get("Authorization") == f"Bearer {token}") and self.still():
            self.refuse(*refused)
        elif repo not in self.hub.repos[kind]:
            self.refuse(404, "RepoNotFound")
        elif revision not in {*self.hub.revisions, self.hub.commit(repo)}:
            self.refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def still(self) -> bool:
        """Whether this request is still one of those that are refused."""
        if self.hub.refusals is not None:
            self.hub.refusals -= 1
            if self.hub.refusals < 0:
                self.hub.refusals = 0
                return False
        return True

    def api(self, found, query, body):
        kind, repo, revision = found["kind"], found["repo"], found["revision"] or "main"
        if not self.known(kind, repo, revision):
            return
        files, commit = self.hub.repos[kind][repo], self.hub.commit(repo)
        if found["what"] == "paths-info":
            text = body.decode()
            wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            return self.send_json(
                [self.entry(p, files[p]) for p in wanted if p in files]
                + [self.directory(p) for p in wanted if any(f.startswith(f"{p}/") for f in files)]
            )
        if found["what"] == "tree":
            sub = f"{found['sub']}/" if found["sub"] else ""
            inside = {p: data for p, data in files.items() if p.startswith(sub)}
            if query.get("recursive", ["false"])[0].lower() == "true":
                folders = {p.rsplit("/", 1)[0] for p in inside if "/" in p}
            else:
                folders = {sub + p.removeprefix(sub).split("/")[0] for p in inside if "/" in p.removeprefix(sub)}
                inside = {p: data for p, data in inside.items() if "/" not in p.removeprefix(sub)}
            return self.send_json(
                [self.directory(p) for p in sorted(folders)] + [self.entry(p, d) for p, d in inside.items()]
            )
        siblings = [{"rfilename": path} for path in files]
        if "blobs" in query:
            for sibling in siblings:
                entry = self.entry(sibling["rfilename"], files[sibling["rfilename"]])
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = entry["lfs"] | {"sha256": entry["lfs"]["oid"]}
        self.send_json({"_id": "0", "id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def entry(self, path, data):
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def directory(self, path):
        return {"type": "directory", "path": path, "size": 0, "oid": git_sha1(path.encode())}

    def resolve(self, kind, repo, revision, file):
        if not self.known(kind, repo, revision, of_files=True):
            return
        files = self.hub.repos[kind][repo]
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        commit = {"X-Repo-Commit": self.hub.commit(repo)}
        if not file.endswith(LARGE):
            return self.send_file(files, file, {**commit, "ETag": f'"{git_sha1(files[file])}"'})
        self.send_response(302)
        # Another host, as the real hub does: its client follows redirects within a host when it asks for metadata.
        location = f"{self.hub.url}/large/{kind}/{repo}/{file}".replace("127.0.0.1", "localhost")
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(files[file]).hexdigest()}"', "X-Linked-Size": len(files[file])}
        for name, value in {**commit, **linked, "Location": location, "Content-Length": 0}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def send_file(self, files, file, headers=()):
        data = files[file]
        if file in self.hub.swap and self.command == "GET":
            data = self.hub.swap[file]
        start, status = 0, 200
        size = len(data)
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **dict(headers)}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(found[1]), min(int(found[2] or size - 1), size - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
            data, status = data[start : end + 1], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut.pop(file, None)
        for at in range(0, len(data), 1 << 16):
            if cut is not None and at >= cut:
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(data[at : at + (1 << 16)])
            time.sleep(self.hub.pause)

    def user(self) -> dict | None:
        """Who asks."""
        return self.hub.users.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def upload(self, body, what, repo, step, batch):
        if what == "validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        lines = [json.loads(line) for line in body.splitlines()]
        if what:
            repo = f"{lines[0]['organization']}/{lines[0]['name']}"
        repo, repos = repo or batch, self.hub.repos["models"]
        if repo in self.hub.refuse and self.still():
            return self.refuse(*self.hub.refuse[repo])
        if self.user() is None or repo.split("/")[0] != self.user()["name"]:
            return self.refuse(403 if self.user() else 401, "")
        if what:
            there = repo in repos
            if not there and (lines[0].get("private") or lines[0].get("visibility") == "private"):
                self.hub.private.add(repo)
            repos.setdefault(repo, {})
            return self.send_json({"url": f"{self.hub.url}/{repo}"}, 409 if there else 200)
        if repo not in repos:
            return self.refuse(404, "RepoNotFound")
        answer = {"preupload": self.preupload, "commit": self.receive_commit}.get(step, self.lfs_batch)
        return self.send_json(answer(repos[repo], lines, repo))

    def preupload(self, files, lines, repo):
        """For each file whether it is large, and the checksum that the repository has of it."""
        answers = []
        for path in (file["path"] for file in lines[0]["files"]):
            large, data = path.endswith(LARGE), files.get(path)
            oid = None if data is None else hashlib.sha256(data).hexdigest() if large else git_sha1(data)
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, files, lines, repo):
        """Where each large file that is not in the storage yet is to be sent."""
        objects = [{"oid": x["oid"], "size": x["size"]} for x in lines[0]["objects"]]
        for x in objects:
            if x["oid"] not in self.hub.uploaded:
                x["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{x['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def store(self, oid):
        length = int(self.headers["Content-Length"])
        if self.hub.breaks:
            self.hub.breaks -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            return self.connection.close()
        data = self.rfile.read(length)
        right = hashlib.sha256(data).hexdigest() == oid
        if right:
            self.hub.uploaded[oid] = data
        return self.send_json({}, 200 if right else 400)

    def receive_commit(self, files, lines, repo):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
        commit = self.hub.commit(repo)
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None}

    def send_json(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, code):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
