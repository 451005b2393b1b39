"""A local HTTP server that passes requests on, or spoils an answer: before a real vLLM server, or before a stand-in."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import torch

Upstream = Callable[[str, str, dict | None], tuple[int, bytes]]


class FaultProxy:
    """`faults` holds what happens to the next POSTs, in turn: `None` passes one on, as all do once it is empty.

    Faults: a status ("429", "500", ...), "refuse" (closed before a byte), "drop" (in mid-body), "slow" (first
    byte after `delay` seconds), "trickle" (all of it, in ten parts), "truncated" (half the JSON, as if whole),
    "short" (a log-prob too few), "shifted" (log-probs of other ids), "nan", "-inf".
    """

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.faults: list[str | None] = []
        self.delay = 0.0
        self.closed = False
        self.retry_after = "0"
        self.posts: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(*proxy.upstream("GET", self.path, None))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if proxy.closed:  # a connection that was kept open
                    return self.hang_up()
                with proxy.lock:
                    proxy.posts.append(body)
                    proxy.headers.append(dict(self.headers))
                    fault = proxy.faults.pop(0) if proxy.faults else None
                    proxy.in_flight += 1
                    proxy.most_in_flight = max(proxy.most_in_flight, proxy.in_flight)
                try:
                    proxy.spoil(self, fault, body)
                finally:
                    with proxy.lock:
                        proxy.in_flight -= 1

            def reply(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def hang_up(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spoil(self, handler: BaseHTTPRequestHandler, fault: str | None, request: dict) -> None:
        if fault and fault.isdigit():
            extra = {"Retry_After": self.retry_after} if fault == "429" else {}
            handler.reply(int(fault), b'{"error": {"message": "as the test asked"}}', **extra)
            return
        if fault == "refuse":
            handler.hang_up()
            return
        if fault == "slow":
            time.sleep(self.delay)
        status, body = self.upstream("POST", handler.path, request)
        if fault in (None, "slow"):
            handler.reply(status, body)
        elif fault == "drop":
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body[: len(body) // 2])
            handler.wfile.flush()
            handler.hang_up()
        elif fault == "trickle":
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            part = -(-len(body) // 10)
            for start in range(0, len(body), part):
                time.sleep(self.delay / 10)
                handler.wfile.write(body[start : start + part])
                handler.wfile.flush()
        elif fault == "truncated":
            handler.reply(status, body[: len(body) // 2])
        else:
            handler.reply(status, json.dumps(spoilt(json.loads(body), fault)).encode())

    def close(self) -> None:
        self.closed = True
        self.server.shutdown()
        self.server.server_close()


def spoilt(answer: dict, fault: str) -> dict:
    """A complete, well-formed answer that is wrong in its last choice."""
    choice = answer["choices"][-1]
    entries = choice.get("prompt_logprobs")
    if entries is None:
        choice["token_ids"] = []
    elif fault == "short":
        entries.pop()
    elif fault == "shifted":
        entries[-1] = {str(int(token) + 1000): value for token, value in entries[-1].items()}
    else:
        for value in entries[-1].values():
            value["logprob"] = float(fault)
    return answer


def forward_to(url: str) -> Upstream:
    """Passes requests on to a real server."""
    client = httpx2.Client(timeout=120)

    def upstream(method: str, path: str, body: dict | None) -> tuple[int, bytes]:
        response = client.request(method, url + path, json=body)
        return response.status_code, response.content

    return upstream


class StandIn:
    """Answers as a vLLM server does, from a model in this process: enough for tests that need no engine."""

    def __init__(self, model, tokenizer, name="served", context=256) -> None:
        self.model, self.tokenizer, self.name, self.context = model, tokenizer, name, context
        self.calls = 0  # of its scoring
        self.noise = 0.0  # added to every second scoring of a token
        self.rounding: torch.dtype | None = None
        self.max_logprobs = 20  # as vLLM's own default
        self.end: int | None = None  # what it ends a sample with, instead of going on
        self.lock = threading.Lock()

    def __call__(self, method: str, path: str, body: dict | None) -> tuple[int, bytes]:
        if path == "/health":
            return 200, b""
        if path == "/v1/models":
            listed = [{"id": name, "max_model_len": self.context} for name in self.name.split()]
            return 200, json.dumps({"data": listed}).encode()
        if body["model"] not in self.name.split():
            return 404, b'{"error": {"message": "The model does not exist."}}'
        if (asked := body.get("prompt_logprobs", 0)) > self.max_logprobs:
            said = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.max_logprobs}"
            return 400, json.dumps({"error": {"message": said}}).encode()
        with self.lock:
            make = self.scored if "prompt_logprobs" in body else self.sampled
            return 200, json.dumps({"choices": make(body)}).encode()

    @torch.no_grad()
    def logps(self, ids: list[int]) -> torch.Tensor:
        logits = self.model(torch.tensor([ids])).logits[0]
        if self.rounding is not None:
            logits = logits.to(self.rounding).float()
        return logits.log_softmax(-1)

    def scored(self, body: dict) -> list[dict]:
        self.calls += 1
        return [
            {"index": i, "prompt_logprobs": self.entries(ids, body["prompt_logprobs"])}
            for i, ids in enumerate(body["prompt"])
        ]

    def entries(self, ids: list[int], others: int) -> list:
        entries = [None]
        for row, token in zip(self.logps(ids)[:-1], ids[1:], strict=True):
            shown = {token, *row.topk(others).indices.tolist()}
            off = self.noise * (self.calls % 2)
            entries.append(
                {
                    str(i): {"logprob": row[i].item() - off, "rank": 1, "decoded_token": self.tokenizer.decode([i])}
                    for i in shown
                }
            )
        return entries

    def sampled(self, body: dict) -> list[dict]:
        choices = []
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        for index in range(body.get("n", 1)):
            ids, said, finish = list(body["prompt"]), [], "length"
            for _ in range(body["max_tokens"]):
                row = self.logps(ids)[-1]
                token = self.end if self.end is not None and len(said) == 5 else None
                if token is None:
                    token = int(torch.multinomial(row.exp(), 1, generator=generator))
                said.append(row[token].item())
                ids.append(token)
                if token in (*body["stop_token_ids"], self.end):
                    finish = "stop"
                    break
            new = ids[len(body["prompt"]) :]
            choices.append(
                {"index": index, "token_ids": new, "logprobs": {"token_logprobs": said}, "finish_reason": finish}
            )
        return choices
