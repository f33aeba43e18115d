"""The wire formats of the local provider: JSON responses, server-sent events, errors.

Written from the types of the providers' SDKs (anthropic 2.12, openai 3.54), and tested with those SDKs.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FORMATS", "Answer", "WireFormat"]

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to one request."""

    provider: str
    model: str
    input_tokens: int
    tokens: Sequence[str]
    """The tokens of the output text, or of the arguments of the tool call."""
    tool: str | None = None
    """The tool to call, if the answer is a tool call."""
    truncated: bool = False
    """The output limit was reached."""
    choices: int = 1
    cache: tuple[int, int, int] = (0, 0, 0)
    """Tokens of cache reads, cache writes, and one-hour cache writes (a part of the latter)."""
    silent: bool = False
    """Omit the usage."""
    usage_requested: bool = True
    """Whether the request asks for the usage of a stream."""
    sequence: Iterator[int] = field(default_factory=itertools.count)
    """Sequence numbers of the events."""

    @property
    def text(self) -> str:
        """The complete output."""
        return "".join(self.tokens)


class WireFormat:
    """The requests and responses of one endpoint."""

    provider = "openai"
    counts_only = False
    """The endpoint counts input tokens, and bills nothing."""

    def count(self, body: dict[str, Any]) -> int:
        """Count the input tokens: one per four bytes of the model's input, plus a constant."""
        read = [
            body[name] for name in ("system", "messages", "tools", "instructions", "input", "prompt") if body.get(name)
        ]
        return len(json.dumps(read, ensure_ascii=False).encode()) // 4 + 3

    def answer(
        self,
        body: dict[str, Any],
        *,
        input_tokens: int | None,
        output_tokens: int,
        text: str | None,
        cache: tuple[int, int, int],
        silent: bool,
    ) -> Answer:
        """The model's answer: a call of the first tool if the request has tools and no tool results; else words."""
        tool = self._tool(body) if text is None else None
        if tool is not None:
            arguments = json.dumps(_arguments(tool[1]))
            tokens = [arguments[at : at + 4] for at in range(0, len(arguments), 4)]
        else:
            tokens = re.findall(r"\S+\s*", text) if text is not None else ["word "] * output_tokens
        limit = self._max_tokens(body)
        return Answer(
            provider=self.provider,
            model=body.get("model", ""),
            input_tokens=self.count(body) if input_tokens is None else input_tokens,
            tokens=tokens[:limit],
            tool=tool[0] if tool else None,
            truncated=len(tokens) > limit if limit is not None else False,
            choices=self._choices(body),
            cache=cache,
            silent=silent,
            usage_requested=self._usage_requested(body),
        )

    def error(self, status: int) -> dict[str, Any]:
        """The body of an error response."""
        kind = _ERRORS.get(status, "server_error")
        return {"error": {"message": f"scripted {kind}", "type": kind, "param": None, "code": None}}

    def document(self, answer: Answer) -> dict[str, Any]:
        """The complete response as JSON."""
        raise NotImplementedError

    def opening(self, answer: Answer) -> bytes:
        """The first events of a stream."""
        return b""

    def delta(self, answer: Answer, token: str) -> bytes:
        """The event of one token."""
        raise NotImplementedError

    def closing(self, answer: Answer) -> bytes:
        """The last events of a stream."""
        raise NotImplementedError

    def failure(self, answer: Answer) -> bytes:
        """An error event within a stream."""
        return _event(self.error(500))

    def _max_tokens(self, body: dict[str, Any]) -> int | None:
        return body.get("max_tokens")

    def _choices(self, body: dict[str, Any]) -> int:
        return int(body.get("n") or 1)

    def _usage_requested(self, body: dict[str, Any]) -> bool:
        return True

    def _tool(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        return None


def _event(data: dict[str, Any], name: str = "") -> bytes:
    line = f"event: {name}\n" if name else ""
    return f"{line}data: {json.dumps(data)}\n\n".encode()


def _arguments(schema: dict[str, Any]) -> dict[str, Any]:
    """Example arguments that match a JSON schema of an object."""
    arguments: dict[str, Any] = {}
    for name, property_ in schema.get("properties", {}).items():
        kinds = {"integer": 1, "number": 1, "boolean": True, "array": [], "object": {}}
        arguments[name] = (
            property_["enum"][0] if "enum" in property_ else kinds.get(property_.get("type", ""), "example")
        )
    return arguments


# -- Anthropic ---------------------------------------------------------------------------------------------------------


class Messages(WireFormat):
    """``POST /v1/messages``."""

    provider = "anthropic"

    def error(self, status: int) -> dict[str, Any]:
        kind = _ERRORS.get(status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": f"scripted {kind}"}, "request_id": "req_local"}

    def _tool(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        used = any(
            block.get("type") == "tool_result"
            for message in body["messages"]
            for block in (message["content"] if isinstance(message["content"], list) else [])
        )
        tools = [tool for tool in body.get("tools") or [] if "input_schema" in tool]
        return (tools[0]["name"], tools[0]["input_schema"]) if tools and not used else None

    def _usage(self, answer: Answer, output_tokens: int) -> dict[str, Any]:
        read, written, written_1h = answer.cache
        return {
            "input_tokens": answer.input_tokens - read - written,
            "cache_read_input_tokens": read,
            "cache_creation_input_tokens": written,
            "cache_creation": {
                "ephemeral_5m_input_tokens": written - written_1h,
                "ephemeral_1h_input_tokens": written_1h,
            },
            "output_tokens": output_tokens,
            "service_tier": "standard",
        }

    def _stop_reason(self, answer: Answer) -> str:
        return "max_tokens" if answer.truncated else "tool_use" if answer.tool else "end_turn"

    def _message(self, answer: Answer, content: list[Any], output_tokens: int, stop: str | None) -> dict[str, Any]:
        message: dict[str, Any] = {"id": "msg_local", "type": "message", "role": "assistant", "model": answer.model}
        message |= {"content": content, "stop_reason": stop, "stop_sequence": None}
        return message if answer.silent else message | {"usage": self._usage(answer, output_tokens)}

    def document(self, answer: Answer) -> dict[str, Any]:
        if answer.tool:
            block = {"type": "tool_use", "id": "toolu_local", "name": answer.tool, "input": json.loads(answer.text)}
        else:
            block = {"type": "text", "text": answer.text}
        return self._message(answer, [block], len(answer.tokens), self._stop_reason(answer))

    def opening(self, answer: Answer) -> bytes:
        block: dict[str, Any] = {"type": "text", "text": ""}
        if answer.tool:
            block = {"type": "tool_use", "id": "toolu_local", "name": answer.tool, "input": {}}
        start = {"type": "message_start", "message": self._message(answer, [], 1, None)}
        return (
            _event(start, "message_start")
            + _event({"type": "content_block_start", "index": 0, "content_block": block}, "content_block_start")
            + _event({"type": "ping"}, "ping")
        )

    def delta(self, answer: Answer, token: str) -> bytes:
        delta = {"type": "text_delta", "text": token}
        if answer.tool:
            delta = {"type": "input_json_delta", "partial_json": token}
        return _event({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")

    def closing(self, answer: Answer) -> bytes:
        end: dict[str, Any] = {"type": "message_delta"}
        end["delta"] = {"stop_reason": self._stop_reason(answer), "stop_sequence": None}
        if not answer.silent:
            end["usage"] = {"output_tokens": len(answer.tokens)}
        return (
            _event({"type": "content_block_stop", "index": 0}, "content_block_stop")
            + _event(end, "message_delta")
            + _event({"type": "message_stop"}, "message_stop")
        )

    def failure(self, answer: Answer) -> bytes:
        return _event(self.error(529), "error")


class CountTokens(Messages):
    """``POST /v1/messages/count_tokens``."""

    counts_only = True


# -- OpenAI ------------------------------------------------------------------------------------------------------------


class ChatCompletions(WireFormat):
    """``POST /v1/chat/completions``."""

    def _max_tokens(self, body: dict[str, Any]) -> int | None:
        return body.get("max_completion_tokens") or body.get("max_tokens")

    def _usage_requested(self, body: dict[str, Any]) -> bool:
        return bool((body.get("stream_options") or {}).get("include_usage"))

    def _tool(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        used = any(message.get("role") == "tool" for message in body["messages"])
        tools = [tool["function"] for tool in body.get("tools") or [] if tool.get("type") == "function"]
        return (tools[0]["name"], tools[0].get("parameters", {})) if tools and not used else None

    def _usage(self, answer: Answer) -> dict[str, Any]:
        output_tokens = len(answer.tokens) * answer.choices
        usage = {"prompt_tokens": answer.input_tokens, "completion_tokens": output_tokens}
        usage["total_tokens"] = answer.input_tokens + output_tokens
        details = {"cached_tokens": answer.cache[0], "cache_write_tokens": answer.cache[1]}
        return {**usage, "prompt_tokens_details": details, "completion_tokens_details": {"reasoning_tokens": 0}}

    def _finish_reason(self, answer: Answer) -> str:
        return "length" if answer.truncated else "tool_calls" if answer.tool else "stop"

    def _frame(self, answer: Answer, kind: str) -> dict[str, Any]:
        return {"id": "chatcmpl-local", "object": kind, "created": 1_700_000_000, "model": answer.model}

    def document(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.tool:
            call = {"id": "call_local", "type": "function"}
            message = {
                "role": "assistant",
                "content": None,
                "tool_calls": [{**call, "function": {"name": answer.tool, "arguments": answer.text}}],
            }
        reason = self._finish_reason(answer)
        choices = [{"index": i, "message": message, "finish_reason": reason} for i in range(answer.choices)]
        document = {**self._frame(answer, "chat.completion"), "choices": choices}
        return document if answer.silent else {**document, "usage": self._usage(answer)}

    def _chunk(self, answer: Answer, delta: dict[str, Any], reason: str | None = None) -> bytes:
        return b"".join(
            _event(
                {
                    **self._frame(answer, "chat.completion.chunk"),
                    "choices": [{"index": i, "delta": delta, "finish_reason": reason}],
                    **({"usage": None} if answer.usage_requested else {}),
                }
            )
            for i in range(answer.choices)
        )

    def opening(self, answer: Answer) -> bytes:
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        if answer.tool:
            call = {"index": 0, "id": "call_local", "type": "function"}
            delta["tool_calls"] = [{**call, "function": {"name": answer.tool, "arguments": ""}}]
        return self._chunk(answer, delta)

    def delta(self, answer: Answer, token: str) -> bytes:
        if answer.tool:
            return self._chunk(answer, {"tool_calls": [{"index": 0, "function": {"arguments": token}}]})
        return self._chunk(answer, {"content": token})

    def closing(self, answer: Answer) -> bytes:
        last = b""
        if answer.usage_requested and not answer.silent:
            frame = self._frame(answer, "chat.completion.chunk")
            last = _event({**frame, "choices": [], "usage": self._usage(answer)})
        return self._chunk(answer, {}, self._finish_reason(answer)) + last + b"data: [DONE]\n\n"


class Completions(ChatCompletions):
    """``POST /v1/completions`` (legacy)."""

    def _max_tokens(self, body: dict[str, Any]) -> int | None:
        return int(body.get("max_tokens") or 16)

    def _choices(self, body: dict[str, Any]) -> int:
        prompt = body.get("prompt")
        prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else 1
        return prompts * int(body.get("n") or 1)

    def _tool(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        return None

    def document(self, answer: Answer) -> dict[str, Any]:
        reason = self._finish_reason(answer)
        choices = [{"index": i, "text": answer.text, "finish_reason": reason} for i in range(answer.choices)]
        return {**self._frame(answer, "text_completion"), "choices": choices, "usage": self._usage(answer)}

    def _chunk(self, answer: Answer, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "text": delta.get("content", ""), "finish_reason": reason}
        return _event({**self._frame(answer, "text_completion"), "choices": [choice]})


class Embeddings(WireFormat):
    """``POST /v1/embeddings``."""

    def answer(self, body: dict[str, Any], **options: Any) -> Answer:
        return super().answer(body, **{**options, "output_tokens": 0, "text": None})

    def document(self, answer: Answer) -> dict[str, Any]:
        data = [{"object": "embedding", "index": 0, "embedding": [0.0, 1.0]}]
        usage = {"prompt_tokens": answer.input_tokens, "total_tokens": answer.input_tokens}
        return {"object": "list", "data": data, "model": answer.model, "usage": usage}


class Responses(WireFormat):
    """``POST /v1/responses``."""

    def _max_tokens(self, body: dict[str, Any]) -> int | None:
        return body.get("max_output_tokens")

    def _tool(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        items = body.get("input")
        used = isinstance(items, list) and any(item.get("type") == "function_call_output" for item in items)
        tools = [tool for tool in body.get("tools") or [] if tool.get("type") == "function"]
        return (tools[0]["name"], tools[0].get("parameters") or {}) if tools and not used else None

    def _item(self, answer: Answer, *, done: bool) -> dict[str, Any]:
        status = "completed" if done else "in_progress"
        if answer.tool:
            arguments = answer.text if done else ""
            call = {"type": "function_call", "id": "fc_local", "call_id": "call_local", "name": answer.tool}
            return {**call, "arguments": arguments, "status": status}
        content = [self._part(answer)] if done else []
        return {"type": "message", "id": "msg_local", "role": "assistant", "status": status, "content": content}

    def _part(self, answer: Answer, text: str | None = None) -> dict[str, Any]:
        return {"type": "output_text", "text": answer.text if text is None else text, "annotations": [], "logprobs": []}

    def _response(self, answer: Answer, *, done: bool) -> dict[str, Any]:
        status = "in_progress" if not done else "incomplete" if answer.truncated else "completed"
        usage = None
        if done and not answer.silent:
            output_tokens = len(answer.tokens)
            usage = {
                "input_tokens": answer.input_tokens,
                "input_tokens_details": {"cached_tokens": answer.cache[0], "cache_write_tokens": answer.cache[1]},
                "output_tokens": output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": answer.input_tokens + output_tokens,
            }
        return {
            "id": "resp_local",
            "object": "response",
            "created_at": 1_700_000_000,
            "model": answer.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [self._item(answer, done=True)] if done else [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": usage,
        }

    def document(self, answer: Answer) -> dict[str, Any]:
        return self._response(answer, done=True)

    def _event(self, answer: Answer, kind: str, **fields: Any) -> bytes:
        return _event({"type": kind, "sequence_number": next(answer.sequence), **fields}, kind)

    def opening(self, answer: Answer) -> bytes:
        events = self._event(answer, "response.created", response=self._response(answer, done=False))
        item = self._item(answer, done=False)
        events += self._event(answer, "response.output_item.added", output_index=0, item=item)
        if not answer.tool:
            at = {"item_id": "msg_local", "output_index": 0, "content_index": 0}
            events += self._event(answer, "response.content_part.added", **at, part=self._part(answer, ""))
        return events

    def delta(self, answer: Answer, token: str) -> bytes:
        if answer.tool:
            at: dict[str, Any] = {"item_id": "fc_local", "output_index": 0}
            return self._event(answer, "response.function_call_arguments.delta", **at, delta=token)
        at = {"item_id": "msg_local", "output_index": 0, "content_index": 0, "logprobs": []}
        return self._event(answer, "response.output_text.delta", **at, delta=token)

    def closing(self, answer: Answer) -> bytes:
        item = self._item(answer, done=True)
        if answer.tool:
            at: dict[str, Any] = {"item_id": "fc_local", "output_index": 0, "name": answer.tool}
            done = self._event(answer, "response.function_call_arguments.done", **at, arguments=answer.text)
        else:
            at = {"item_id": "msg_local", "output_index": 0, "content_index": 0}
            done = self._event(answer, "response.output_text.done", **at, text=answer.text, logprobs=[])
            done += self._event(answer, "response.content_part.done", **at, part=self._part(answer))
        done += self._event(answer, "response.output_item.done", output_index=0, item=item)
        last = "response.incomplete" if answer.truncated else "response.completed"
        return done + self._event(answer, last, response=self._response(answer, done=True))

    def failure(self, answer: Answer) -> bytes:
        return self._event(answer, "error", code="server_error", message="scripted", param=None)


FORMATS: dict[str, WireFormat] = {
    "/v1/messages": Messages(),
    "/v1/messages/count_tokens": CountTokens(),
    "/v1/chat/completions": ChatCompletions(),
    "/v1/completions": Completions(),
    "/v1/embeddings": Embeddings(),
    "/v1/responses": Responses(),
}
"""The endpoints by path."""
