"""A stand-in for vLLM, which needs a GPU: a small engine on the CPU, as strict as vLLM where TRL meets it.

`install` puts it where TRL imports vLLM: `LLM` and `SamplingParams` for `vllm_mode: colocate`. A `Server` speaks the
HTTP protocol of `vllm serve`, as TRL's client uses it, on loopback; weights reach it over a gloo group, which stands
for the NCCL one: each tensor is announced by name, type and shape, then broadcast.
"""

import json
import socket
import threading
import time
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
import trl.generation.vllm_client as vllm_client
import trl.generation.vllm_generation as vllm_generation
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SECONDS = timedelta(seconds=10)  # of the gloo group: a side that waits for a broadcast fails after these
ENGINE_ARGUMENTS = {
    *("tensor_parallel_size", "distributed_executor_backend", "gpu_memory_utilization", "max_model_len"),
    *("max_num_seqs", "max_num_batched_tokens", "enable_sleep_mode", "model_impl", "quantization"),
    *("seed", "logprobs_mode", "trust_remote_code"),
}


class SamplingParams:
    """vLLM's settings of sampling: an unknown one is a TypeError, one out of range a ValueError."""

    def __init__(self, *, n=1, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, max_tokens=16,
                 logprobs=None, stop_token_ids=None, ignore_eos=False, seed=None, structured_outputs=None):  # fmt: skip
        checks = {
            "n": n == 1,  # TRL asks for one completion at a time
            "temperature": 0 <= temperature <= 2,
            "top_p": 0 < top_p <= 1,
            "top_k": isinstance(top_k, int) and top_k >= -1,
            "min_p": 0 <= min_p <= 1,
            "repetition_penalty": repetition_penalty > 0,
            "max_tokens": max_tokens >= 1,
            "stop_token_ids": all(isinstance(token, int) for token in stop_token_ids or []),
            "structured_outputs": structured_outputs is None,
        }
        for name, fits in checks.items():
            if not fits:
                raise ValueError(f"{name} is out of its range")
        self.stop_token_ids, self.ignore_eos = stop_token_ids or [], ignore_eos
        self.max_tokens, self.logprobs = max_tokens, logprobs
        shapers = [
            (RepetitionPenaltyLogitsProcessor, repetition_penalty, repetition_penalty != 1),
            (TemperatureLogitsWarper, float(temperature), temperature != 1),
            (TopKLogitsWarper, top_k, top_k > 0),
            (TopPLogitsWarper, top_p, top_p < 1),
            (MinPLogitsWarper, min_p, min_p > 0),
        ]
        self.shapers = [make(value) for make, value, active in shapers if active]
        self.given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        self.given |= {"repetition_penalty": repetition_penalty, "max_tokens": max_tokens, "logprobs": logprobs}
        self.given |= {"stop_token_ids": self.stop_token_ids, "ignore_eos": ignore_eos}


class Engine:
    """The model of a folder in the type `dtype`, which samples, and takes new weights by name."""

    def __init__(self, path, dtype=torch.float32):
        self.path = path
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        ends = self.model.generation_config.eos_token_id
        self.own_ends = {AutoTokenizer.from_pretrained(path).eos_token_id, *([ends] if isinstance(ends, int) else ends)}
        self.fresh, self.asleep, self.params, self.sampled = True, False, [], []

    def load_weights(self, pairs):
        """As vLLM: an unknown name or a wrong shape is an error; what was cached of prompts is then outdated."""
        if self.asleep:
            raise RuntimeError("the memory of the weights is not mapped")
        own = dict(self.model.named_parameters())
        for name, weight in pairs:
            if name not in own:
                raise ValueError(f"There is no module or parameter named '{name}' in {type(self.model).__name__}")
            if own[name].shape != weight.shape:
                raise ValueError(f"{name}: shape {tuple(weight.shape)}, not {tuple(own[name].shape)}")
            own[name].data.copy_(weight)
        self.fresh = False

    def reset_prefix_cache(self):
        self.fresh = True

    @torch.no_grad()
    def sample(self, prompt_ids, params):
        """A completion's tokens, its end token included, and the log-probability of each as it was drawn."""
        if not self.fresh or self.asleep:
            raise RuntimeError("asked to sample with outdated keys and values" if self.fresh else "asleep")
        self.params.append(params.given)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.own_ends)}
        ids, logprobs = list(prompt_ids), []
        while len(logprobs) < params.max_tokens:
            tokens = torch.tensor([ids])
            logits = self.model(tokens).logits[:, -1].float()
            for shaper in params.shapers:
                logits = shaper(tokens, logits)
            distribution = logits[0].log_softmax(0)
            token = torch.multinomial(distribution.exp(), 1).item()
            ids.append(token)
            logprobs.append(distribution[token].item())
            if token in ends:
                break
        self.sampled.append((list(prompt_ids), ids[len(prompt_ids) :]))
        return ids[len(prompt_ids) :], logprobs


# --- vllm_mode: colocate ------------------------------------------------------------------------------------------


def make_llm_class(engines, dtype):
    """The class `LLM`, whose engines are appended to a list."""

    class LLM:
        def __init__(self, model, **settings):
            if set(settings) - ENGINE_ARGUMENTS:
                raise TypeError(f"unexpected keyword arguments {set(settings) - ENGINE_ARGUMENTS}")
            if settings["logprobs_mode"] != "processed_logprobs":
                raise ValueError("log-probabilities before temperature and the like are of another distribution")
            self.engine = Engine(model, dtype)
            engines.append(self.engine)
            runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.engine.load_weights))
            worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
            self.llm_engine = SimpleNamespace(model_executor=worker)
            self.reset_prefix_cache = self.engine.reset_prefix_cache

        def generate(self, prompts, sampling_params, use_tqdm=True):
            outputs = []
            for prompt in prompts:
                ids, logprobs = self.engine.sample(prompt["prompt_token_ids"], sampling_params)
                rows = [{i: SimpleNamespace(logprob=p, rank=1)} for i, p in zip(ids, logprobs, strict=True)]
                completion = SimpleNamespace(token_ids=ids, logprobs=rows)
                outputs.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[completion]))
            return outputs

        def sleep(self, level):
            assert level == 2
            for parameter in self.engine.model.parameters():  # level 2 throws the weights away
                parameter.data.fill_(float("nan"))
            self.engine.asleep = True

        def wake_up(self, tags):
            self.engine.asleep &= "weights" not in tags

    return LLM


# --- vllm_mode: server --------------------------------------------------------------------------------------------


class Group:
    """Two ranks of gloo, the trainer being rank 0, which hosts the meeting point; blocks until both are there."""

    def __init__(self, info, rank):
        port = info["master_port"]
        store = torch.distributed.TCPStore(info["master_address"], port, 2, is_master=rank == 0, timeout=SECONDS)
        self.gloo = torch.distributed.ProcessGroupGloo(store, rank, 2, timeout=SECONDS)
        self.group = SimpleNamespace(store=store, socket=None)  # the client drops them when it closes

    def broadcast(self, tensor):
        """From the trainer, in place."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        self.gloo.broadcast([tensor], options).wait()


def send_weights(iterator, group, src, post_iter_func):
    for pair in iterator:
        group.broadcast(post_iter_func(pair).detach().clone().contiguous().view(-1).view(torch.uint8))


class Refused(Exception):
    """What the server does not take; the client gets its text."""


class Server:
    """`VLLM_SERVER_DEV_MODE=1 vllm serve <path> --weight-transfer-config …` in a thread, on a port of its own.

    `delay` is how many seconds a completion takes; `die_at` kills the server at that call for completions, counted
    from 1. `received` has one dict of names and tensors for each weight update.
    """

    def __init__(self, path, port=0, delay=0.0, die_at=None):
        self.engine, self.delay, self.die_at = Engine(path), delay, die_at
        self.group, self.updating, self.received, self.calls, self.stopped = None, False, [], [], False
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                path = self.path.split("?")[0]
                server.calls.append(path)
                try:
                    status, said = 200, server.handle(path, body)
                except Refused as refused:
                    status, said = 400, {"error": str(refused)}
                except ConnectionAbortedError:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                said = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST = answer

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        self.stopped = True  # for the connections that are open
        self.http.shutdown()
        self.http.server_close()

    def handle(self, path, body):
        """One call; the answer as JSON."""
        answers = {
            "/health": lambda: {},
            "/v1/models": lambda: {"data": [{"id": self.engine.path}]},
            "/server_info": lambda: {
                "vllm_config": {
                    "weight_transfer_config": {"backend": "nccl"},
                    "model_config": {"logprobs_mode": "processed_logprobs"},
                }
            },
            "/get_world_size": lambda: {"world_size": 1},
            "/init_weight_transfer_engine": lambda: self.join(body["init_info"]),
            "/start_weight_update": self.start_update,
            "/update_weights": lambda: self.update(body["update_info"]),
            "/finish_weight_update": self.finish_update,
            "/reset_prefix_cache": lambda: {"success": self.engine.reset_prefix_cache() is None},
            "/v1/completions": lambda: self.complete(**body),
        }
        if self.stopped:
            raise ConnectionAbortedError
        if path not in answers:
            raise Refused(f"there is no {path}")
        return answers[path]()

    def join(self, info):
        assert (info["rank_offset"], info["world_size"], info["packed"]) == (1, 2, True)
        self.group = Group(info, rank=1)
        return {}

    def start_update(self):
        if self.group is None:
            raise Refused("the weight transfer engine has not been initialised")
        self.updating = True
        return {}

    def update(self, info):
        if not self.updating:
            raise Refused("no weight update has been started")
        self.received.append({})
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(weight.view(-1).view(torch.uint8))
            self.received[-1][name] = weight
        try:
            self.engine.load_weights(self.received[-1].items())
        except ValueError as error:
            raise Refused(str(error)) from error
        return {}

    def finish_update(self):
        self.updating = False
        return {}

    def complete(self, model, prompt, return_token_ids, return_tokens_as_token_ids, **settings):
        if self.updating or model != self.engine.path:
            raise Refused("in the middle of a weight update" if self.updating else f"no model {model}")
        if self.die_at is not None and self.calls.count("/v1/completions") >= self.die_at:
            threading.Thread(target=self.stop).start()
            raise ConnectionAbortedError
        time.sleep(self.delay)
        try:
            params = SamplingParams(**settings)
        except (TypeError, ValueError) as error:  # vLLM ignores a setting that it does not know; here it must not occur
            raise Refused(str(error)) from error
        choices = []
        for ids in prompt:
            tokens, logprobs = self.engine.sample(ids, params)
            names = [f"token_id:{token}" for token in tokens]
            top = [{name: logprob} for name, logprob in zip(names, logprobs, strict=True)]
            said = {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top}
            choices.append({"prompt_token_ids": ids, "token_ids": tokens, "logprobs": said})
        return {"choices": choices}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# --- Where TRL looks ----------------------------------------------------------------------------------------------


def install(monkeypatch, dtype=torch.float32):
    """Have TRL find this in place of vLLM; returns the list that gets the engine of each `LLM` that is made."""
    engines = []
    for module in ("trl_ppo.config", "trl.generation.vllm_generation", "trl.generation.vllm_client"):
        monkeypatch.setattr(f"{module}.is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(vllm_generation, "LLM", make_llm_class(engines, dtype), raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SamplingParams, raising=False)
    monkeypatch.setattr(vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", True)
    monkeypatch.setattr(vllm_client, "_HAS_RESET_PREFIX_CACHE_SUCCESS", True)
    monkeypatch.setattr(vllm_client, "get_ip", lambda: "127.0.0.1", raising=False)
    monkeypatch.setattr(vllm_client, "open_trainer_endpoint", lambda info: Group(info, rank=0), raising=False)
    monkeypatch.setattr(vllm_client, "packed_nccl_broadcast_producer", send_weights, raising=False)
    join = vllm_client.VLLMClient.init_communicator  # which insists on a CUDA device, and then joins the group
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: join(self, "cuda"))
    # TRL sets RANK and the like for vLLM; the next trainer in this process would take them for a launcher's.
    monkeypatch.setattr(vllm_generation, "os", SimpleNamespace(environ={}))
    monkeypatch.setattr(vllm_generation, "ensure_master_addr_port", lambda: None)
    return engines
