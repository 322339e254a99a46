"""A server that gives the second of the labels asked for. With `wrong` it answers 500 from the
third request on; with `child` a child process holds 100 MB and uses the processor for a second."""

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHILD = """
import time
held = bytearray(100_000_000)
while time.process_time() < 1:
    pass
print("done", flush=True)
time.sleep(600)
"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Handler.asked += 1
        answer = json.dumps({"label": json.loads(body)["candidate_labels"][1]}).encode()
        self.send_response(500 if "wrong" in sys.argv and Handler.asked > 2 else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None: ...


class Server(ThreadingHTTPServer):
    request_queue_size = 100


if __name__ == "__main__":
    if "child" in sys.argv:
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
