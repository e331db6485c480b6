"""A real HTTP server on loopback that answers as an OpenAI-compatible one does, as well or as badly as a test wants."""

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What the tests' template makes of a question.
TEMPLATE = "{prompt}\n<A>{a}</A>\n<B>{b}</B>\nBetter:"
QUESTION = re.compile(r"(.*)\n<A>(.*)</A>\n<B>(.*)</B>\nBetter:\s*", re.DOTALL)


class JudgeServer(ThreadingHTTPServer):
    """`behave(a, b, number)` gives a reply's text, or `(status, headers, body)`; `asked` counts the questions."""

    daemon_threads = True

    def __init__(self, behave, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.behave, self.asked, self.headers_seen = behave, Counter(), []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Nobody answers at its address any more."""
        self.shutdown()
        self.server_close()

    @property
    def spec(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1#judge-model"

    def handle_error(self, request, client_address):
        """A client that was killed is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # a response in one piece

    def do_POST(self):
        server = self.server
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = sent["messages"][-1]["content"]
        with server.lock:
            server.asked[text] += 1
            number = sum(server.asked.values())
            server.headers_seen.append(dict(self.headers))
        _, a, b = QUESTION.fullmatch(text).groups()
        given = server.behave(a, b, number)
        status, headers, body = given if isinstance(given, tuple) else (200, {}, completion(given))
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def completion(reply: str) -> bytes:
    usage = {"prompt_tokens": 7, "completion_tokens": 1}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}], "usage": usage}).encode()
