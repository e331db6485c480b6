"""Who says which of two texts is better: an OpenAI-compatible server, a causal LM on this machine, or a function.

A question is `(prompt, a, b)`. Each judge has `source`, all that decides its answers; `answer(questions)`, which gives
a dict for each with `answer`: "A", "B", "tie", or None where its reply cannot be read; `size`, the most questions in a
call of it, and `workers`, the most such calls at once. All that goes wrong is a UserError.
"""

import hashlib
import inspect
import json
import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import torch
import urllib3

from eval.loading import check_language_model, load_model, load_tokenizer, positions_of
from eval.provenance import describe_model, describe_source, describe_versions
from rewards import find_function
from trl_ppo.inputs import UserError, first_line
from trl_ppo.logprobs import add_logprobs_forward, pad_batch

OPTION = "--pairwise_judge"
Question = tuple[str, str, str]
# A letter alone on the last line, or after a colon there; "A is better than B" is no answer.
LETTER = re.compile(r"(?:.*:)?\W*(?:(?:summary|continuation|text|response|option|answer)\W+)?([AB])\W*", re.IGNORECASE)
TOKENS = ("prompt_tokens", "completion_tokens")
REPLY = 200  # characters of a reply that are kept
RETRIES, FIRST_RETRIES = 8, 3  # of a call; fewer of the first, which finds out whether the judge works
BACKOFF = 0.5  # seconds, doubled at every retry but the first: about two minutes in all, unless the server says longer
LONGEST_WAIT = 300  # seconds that a server may ask for
CONNECT = 10  # seconds to open a connection


def fill(template: str, question: Question) -> str:
    """The template with the question's texts in place of {prompt}, {a} and {b}; braces in the texts stay."""
    texts = dict(zip(("prompt", "a", "b"), question, strict=True))
    return re.sub(r"\{(prompt|a|b)\}", lambda match: texts[match[1]].strip(), template)


def read_letter(reply: str) -> str | None:
    """The letter that a reply ends in, None if it cannot be told."""
    lines = reply.strip().splitlines()
    found = LETTER.fullmatch(lines[-1]) if lines else None
    return found[1].upper() if found else None


class Server:
    """A model behind an OpenAI-compatible URL, `URL#MODEL`. The key comes from the environment and is never written."""

    size = 1

    def __init__(self, args, template: str):
        spec = args.pairwise_judge
        self.url, _, self.model = spec.partition("#")
        try:
            parts = urlsplit(self.url)
            secret, host = parts.username or parts.password or parts.query, parts.hostname
        except ValueError:
            secret, host = None, None
        if secret:  # not shown: it may be a key
            raise UserError(f"{OPTION}: a URL holds no user, password or query; put a key into ${args.judge_key_env}")
        if not host or not self.model:
            raise UserError(f"{OPTION} {spec}: expected URL#MODEL, such as http://localhost:8000/v1#my-model")
        self.template, self.settings, self.workers = template, args.judge_settings, args.judge_concurrency
        self.source = {"path": spec, "sha256": None, "settings": self.settings}
        self.key_name, self.key = args.judge_key_env, os.environ.get(args.judge_key_env, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError(f"{OPTION}: what is in ${self.key_name} is no key: it has characters that no header takes")
        self.headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.timeout = urllib3.Timeout(connect=CONNECT, read=args.judge_timeout)
        proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
        pool = {"maxsize": self.workers}
        self.http = urllib3.ProxyManager(proxy, **pool) if proxy else urllib3.PoolManager(**pool)
        self.retry = self._retry(total=FIRST_RETRIES, connect=0)

    @staticmethod
    def _retry(**limits) -> urllib3.Retry:
        """Retries of what may pass: rate limits, with the wait that the server asks for, and its own failures."""
        return urllib3.Retry(
            **limits,
            read=2,
            allowed_methods=None,
            status_forcelist=[408, 409, 429, 500, 502, 503, 504],
            backoff_factor=BACKOFF,
            raise_on_status=False,
            retry_after_max=LONGEST_WAIT,
        )

    def answer(self, questions: list[Question]) -> list[dict]:
        """One call for the one question; tokens are what the server says that it used."""
        messages = [{"role": "user", "content": fill(self.template, questions[0])}]
        body = {"model": self.model, "messages": messages, **self.settings}
        where = f"{self.url.rstrip('/')}/chat/completions"
        try:
            response = self.http.request(
                "POST", where, json=body, headers=self.headers, timeout=self.timeout, retries=self.retry
            )
        except urllib3.exceptions.HTTPError as error:
            reason = first_line(getattr(error, "reason", None) or error)
            raise UserError(f"{OPTION} {where}: no answer: {self._without_key(reason)}") from None
        text = self._without_key(response.data.decode("utf-8", "replace"))
        if response.status != 200:
            raise UserError(
                f"{OPTION} {where}: {self._refusal(response.status)} (HTTP {response.status}): {text[:REPLY]}"
            )
        self.retry = self._retry(total=RETRIES)  # it works: from now on it may take a while to come back
        reply, letter, tokens = _read(text)
        reply = self._without_key(reply).encode("utf-8", "replace").decode()[:REPLY]
        return [{"answer": letter, "reply": reply, **tokens, "retries": len(response.retries.history)}]

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self.key else text

    def _refusal(self, status: int) -> str:
        if status in (401, 403):
            return (
                f"it refuses the key in ${self.key_name}"
                if self.key
                else f"it wants a key; put it into ${self.key_name}"
            )
        if status == 404:
            return f"it has no model {self.model!r}, or the URL is another (many end in /v1)"
        if status == 429 or status >= 500:
            return "it fails, after several retries"
        return "it refuses the question; --judge_settings changes what is sent with it"


def _read(text: str) -> tuple[str, str | None, dict]:
    """(reply, letter, tokens) of a server's response; whatever is not of the expected form is a reply without one."""
    try:
        body = json.loads(text)
        reply = body["choices"][0]["message"]["content"]
        letter = read_letter(reply)
    except (ValueError, LookupError, TypeError, AttributeError):
        return text, None, dict.fromkeys(TOKENS, 0)
    used = body.get("usage")
    counts = {name: used.get(name) if isinstance(used, dict) else 0 for name in TOKENS}
    return reply, letter, {name: count if isinstance(count, int) else 0 for name, count in counts.items()}


class LanguageModel:
    """A causal LM on this machine, in float32: the letter that it gives the higher log-probability; no sampling."""

    workers = 1

    def __init__(self, args, template: str):
        self.path, self.template, self.size, self.model = args.pairwise_judge, template, args.batch_size, None
        config = check_language_model(OPTION, self.path)
        self.tokenizer, self.positions = load_tokenizer(self.path), positions_of(config)
        versions = describe_versions()
        self.source = describe_model(self.path, config) | {name: versions[name] for name in ("torch", "transformers")}
        chat = bool(self.tokenizer.chat_template)  # ends where the reply begins; a plain text goes on with a space
        self.letters = [self._ids(letter if chat else f" {letter}", False) for letter in "AB"]
        if self.letters[0] == self.letters[1]:
            raise UserError(f"{OPTION} {self.path}: its tokenizer does not tell A from B")
        self._prompt(("", "", ""))  # now, where nothing fits its positions

    def _ids(self, text: str, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _prompt(self, question: Question) -> list[int]:
        text, chat = fill(self.template, question), bool(self.tokenizer.chat_template)
        if chat:
            messages = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self._ids(text.rstrip("\n") if not chat else text, special=not chat)
        if len(ids) + max(map(len, self.letters)) > self.positions:
            raise UserError(
                f"{OPTION} {self.path}: a question of {len(ids)} tokens is over its {self.positions} positions"
            )
        return ids

    def answer(self, questions: list[Question]) -> list[dict]:
        """One pass over both letters of every question."""
        if self.model is None:  # not before: until the models that are compared have drawn, memory is theirs
            self.model = add_logprobs_forward(load_model(self.path))
        prompts, n = [self._prompt(question) for question in questions], len(questions)
        letters = [ids for ids in self.letters for _ in range(n)]
        batch = pad_batch(prompts * 2, letters, self.tokenizer.pad_token_id)
        width = batch.pop("completion_mask").size(1)
        with torch.no_grad():
            inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            logprobs = self.model(**inputs, num_completion_tokens=width).logprobs.double().sum(1)
        margins = (logprobs[:n] - logprobs[n:]).tolist()
        return [{"answer": "A" if margin > 0 else "B" if margin < 0 else "tie"} for margin in margins]


class Function:
    """`f(prompts, pairs) -> list`: for each pair of texts the index, 0 or 1, of the better one, or −1 for a tie."""

    workers = 1

    def __init__(self, args, template: str):
        self.name, self.size = args.pairwise_judge, args.batch_size
        self.function = find_function(OPTION, self.name)
        try:
            inspect.signature(self.function).bind([], [])
            source = Path(inspect.getsourcefile(self.function)).read_bytes()
        except (TypeError, ValueError, OSError) as error:
            raise UserError(f"{OPTION} {self.name}: a judge is a Python function f(prompts, pairs): {error}") from error
        self.source = describe_source(self.name) | {"sha256": hashlib.sha256(source).hexdigest()}

    def answer(self, questions: list[Question]) -> list[dict]:
        """One call for all of them."""
        try:
            given = list(self.function([prompt for prompt, _, _ in questions], [[a, b] for _, a, b in questions]))
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{OPTION} {self.name} failed: {said}") from error
        if len(given) != len(questions):
            raise UserError(f"{OPTION} {self.name} returned {len(given)} answers to {len(questions)} pairs")
        for value in given:
            if value not in (0, 1, -1):
                raise UserError(f"{OPTION} {self.name} returned {value!r}, not 0, 1 or -1")
        return [{"answer": {0: "A", 1: "B", -1: "tie"}[value]} for value in given]
