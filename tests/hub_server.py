"""The few answers of the Hub that pushing a small model asks for, from a server on loopback."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer(ThreadingHTTPServer):
    """`files` are the bytes that were committed, by repository and path."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def commit(self, repository, lines):
        for row in map(json.loads, lines):
            if row["key"] == "file":
                content = base64.b64decode(row["value"]["content"])
                self.files.setdefault(repository, {})[row["value"]["path"]] = content


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer, repository = {}, self.path.removeprefix("/api/models/").split("/commit/")[0]
        if self.path.endswith("/create"):
            asked = json.loads(data)
            answer = {"url": f"{self.server.url}/{asked.get('organization', 'user')}/{asked['name']}"}
        elif "/preupload/" in self.path:
            kept = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{"path": each["path"], **kept} for each in json.loads(data)["files"]]}
        elif "/commit/" in self.path:
            self.server.commit(repository, data.decode().splitlines())
            answer = {"commitUrl": f"{self.server.url}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40}
        self.answer(answer)

    def do_GET(self):
        self.answer({})

    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """No line for each request."""
