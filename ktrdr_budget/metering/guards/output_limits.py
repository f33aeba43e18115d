"""Published output limits of models, for requests that set no limit themselves.

Read on 2026-11-28:

- Claude: platform.claude.com/docs/en/about-claude/models/overview ("Max output"); older models as listed by
  docs.aihubmix.com/en/api/Claude-Native; Claude 4.6 to 4.8 as in release 4.0.0-beta.106 of @effect/ai-anthropic.
- OpenAI: its pages of models (platform.openai.com/docs/models), as listed by scriptbyai.com/token-limit-openai-chatgpt
  (2025-10-17), vercel.com/ai-gateway/models and rageagainstthepixel.github.io/OpenAI-DotNet.

Where sources differ, this table has the larger number. The bound of an unlisted model is its context window.
"""

from __future__ import annotations

import re

__all__ = ["published_output_maximum"]

_SNAPSHOT = r"(-latest|[-@]\d{8}|-\d{4}-\d{2}-\d{2})?$"
_CLAUDE = (
    (r"claude-3-(haiku|sonnet|opus)", 4_096),
    (r"claude-3-5-(haiku|sonnet)", 8_192),
    (r"claude-3-7-sonnet", 128_000),  # with a beta header
    (r"claude-opus-4(-[01])?", 32_000),
    (r"claude-(sonnet-4(-[05])?|(haiku|opus)-4-5)", 64_000),
    (r"claude-(opus-4-[678]|sonnet-4-6|fable-5|opus-5|sonnet-5)", 128_000),
)
_GPT = (
    (r"gpt-3\.5-turbo(-16k)?(-0125|-1106)?", 4_096),
    (r"gpt-4-turbo", 4_096),
    (r"(gpt-4o(-mini)?|chatgpt-4o)", 16_384),
    (r"gpt-4\.1(-mini|-nano)?", 32_768),
    (r"gpt-5(-mini|-nano)?", 128_000),
    (r"gpt-5-pro", 272_000),
    (r"gpt-5\.(2|4|4-pro)", 128_000),
    (r"o1-preview", 32_768),
    (r"o1-mini", 65_536),
    (r"(o1(-pro)?|o3(-pro|-mini)?|o4-mini|codex-mini)", 100_000),
)


def _compiled(table: tuple[tuple[str, int], ...]) -> list[tuple[re.Pattern[str], int]]:
    return [(re.compile(name + _SNAPSHOT), tokens) for name, tokens in table]


_PUBLISHED = {"anthropic": _compiled(_CLAUDE), "openai": _compiled(_GPT), "azure": _compiled(_GPT)}


def published_output_maximum(provider: str, model: str) -> int | None:
    """The maximum tokens of one answer, including reasoning; ``None`` if it is unknown.

    A fine-tuned model has the limit of its base.
    """
    base = model.split(":")[1] if model.startswith("ft:") else model
    for pattern, tokens in _PUBLISHED.get(provider, ()):
        if pattern.match(base):
            return tokens
    return None
