"""What a chat template is given: marks that users imitate, variables that are not theirs, types it cannot print."""

from __future__ import annotations

from typing import Any

import pytest

from models.errors import InvalidRequest
from models.schemas import ChatOptions, Message
from models.tokenizer import TextTokenizer
from tests.tiny_models import make_tokenizer

TEMPLATE = (
    "{%- set ns = namespace(last=0) %}{{ bos_token }}"
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<tool_call>{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if hint is defined %}{{ 'Hint: ' + hint }}{% endif %}"
)
CHAT = (Message("user", "Hi"),)
LIKE_A_MARK = "usertext" + "0" * 32 + "end"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    fast = make_tokenizer()
    fast.bos_token = "<|endoftext|>"
    fast.chat_template = TEMPLATE
    return TextTokenizer(fast)


def tool(description: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "description": description, "parameters": {"type": "object"}}}


def test_what_looks_like_a_mark_is_text(tokenizer: TextTokenizer) -> None:
    """Plain words of tools and variables stand in the template as they are."""
    ids = tokenizer.encode_chat(
        CHAT, chat=ChatOptions(tools=(tool(LIKE_A_MARK),), template_values={"hint": LIKE_A_MARK})
    )
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.count(LIKE_A_MARK) == 2 and "Hi<|im_end|>" in text


def test_variables_of_a_template_are_those_that_are_the_users(tokenizer: TextTokenizer) -> None:
    """Neither functions that a template calls, nor the tokens that it puts between turns."""
    assert tokenizer.template_variables == {"hint"}
    for name in ("namespace", "bos_token", "messages"):
        with pytest.raises(InvalidRequest, match=f"{name}: .*no such variable; it has: hint"):
            tokenizer.encode_chat(CHAT, chat=ChatOptions(template_values={name: "x"}))


def test_variable_may_not_be_a_control_token_that_is_a_word() -> None:
    fast = make_tokenizer(("<tool_call>", "</tool_call>", "CONTROL"))
    fast.chat_template = TEMPLATE
    with pytest.raises(InvalidRequest, match="hint: has a control token"):
        TextTokenizer(fast).encode_chat(CHAT, chat=ChatOptions(template_values={"hint": "a-CONTROL"}))


def test_variable_of_a_wrong_type_is_told(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidRequest, match="cannot show them with these variables"):
        tokenizer.encode_chat(CHAT, chat=ChatOptions(template_values={"hint": 5}))
