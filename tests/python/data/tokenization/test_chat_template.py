"""Chat templates: the same text as transformers, the same refusals, and a sandbox."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers_for_tests import CHATML, byte_level, save
from transformers import AutoTokenizer

from logratio.data import ChatTemplate, ChatTemplateError, PreferenceTokenizer

LLAMA = """{{- bos_token }}
{%- set date = strftime_now("%Y") if date_string is not defined else date_string %}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}
        {{- '<|start|>system<|end|>\\n\\nYear: ' + date + '\\n' + message['content'] | trim }}
    {%- elif message.role == 'tool' %}
        {{- '<|start|>ipython<|end|>' + message | tojson }}
    {%- else %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim }}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
CONTROLS = """{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% if loop.index > 6 %}{% break %}{% endif %}
    {% set space = namespace(role=message.role | upper) %}
{{ space.role }}: {% if message.role == 'assistant' %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {% else %}
{{ message.content }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}ASSISTANT: {% endif %}
"""
THINKING = """{%- for message in messages %}
{%- if message.reasoning_content is defined %}[{{ message.reasoning_content }}]{% endif %}
{%- if message.thinking is defined %}({{ message.thinking }}){% endif %}
{%- if message.content is defined %}{{ message.content }}{% else %}nothing{% endif %}
{%- if tools is none and documents is none and unk_token %}|{% endif %}
{%- endfor %}"""
SPACED = "  {% if messages %}\n    {{ dict(a=1).a }}{{ messages | length }}\n  {% endif %}\n\nend\n"
TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "controls": CONTROLS,
    "thinking": THINKING,
    "spaced": SPACED,
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "How are you? <b>&</b> ünïcode"}],
    "system": [
        {"role": "system", "content": "  Be kind.\n"},
        {"role": "user", "content": "Hi "},
        {"role": "assistant", "content": " Hello"},
        {"role": "user", "content": "Bye"},
    ],
    "tools": [
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "add", "arguments": {"a": 2}}],
        },
        {"role": "tool", "content": "4 é", "name": None},
    ],
    "reasoning": [
        {"role": "user", "content": "Why?", "reasoning": "hm"},
        {"role": "assistant", "content": None, "thinking": "so"},
        {"role": "assistant", "content": "Thus", "reasoning_content": "that", "thinking": "this"},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tokenizer"), byte_level())


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_renders_as_transformers(folder: Path, template: str, chat: str, generation: bool) -> None:
    source, messages = TEMPLATES[template], CHATS[chat]
    theirs = AutoTokenizer.from_pretrained(folder)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    ours = ChatTemplate(source, {name: getattr(theirs, name) for name in names})
    expected = theirs.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=generation
    )
    assert isinstance(expected, str) and expected.strip()
    assert ours.render(messages, add_generation_prompt=generation) == expected


def test_tools_are_rendered_as_transformers_does(folder: Path) -> None:
    source = (
        "{% if tools is none %}no{% else %}{{ tools | tojson }}{% endif %}{{ messages[0].role }}"
    )
    tool: dict[Any, Any] = {
        "type": "function",
        "function": {"name": "f", "description": "é", "parameters": {"type": "object"}},
    }
    theirs, ours = AutoTokenizer.from_pretrained(folder), ChatTemplate(source, {})
    for tools in ([], [tool], [tool, tool]):
        expected = theirs.apply_chat_template(
            CHATS["one"], tools=[*tools] or None, chat_template=source, tokenize=False
        )
        assert ours.render(CHATS["one"], tools=tools) == expected


def test_raise_exception_carries_its_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template.render(CHATS["one"])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(_secret=1) }}",
        "{% set n = namespace() %}{% set n._secret = 1 %}",
        "{{ dict.__init__ }}{{ dict.__globals__.sys }}",
        "{{ messages[0].content / 0 }}",
        "{{ absent.attribute }}",
    ],
)
def test_every_failure_of_a_template_is_one_kind_of_error(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render(CHATS["one"])


def test_malformed_template_names_its_line() -> None:
    with pytest.raises(ChatTemplateError, match="line 2"):
        ChatTemplate("fine\n{% if %}", {})


def test_template_may_come_from_config_file_or_argument(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    folder = save(tmp_path, byte_level(), chat_template=named)
    assert PreferenceTokenizer.load(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert PreferenceTokenizer.load(folder).chat_template == "J"
    assert PreferenceTokenizer.load(folder, chat_template="A").chat_template == "A"


def test_several_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), chat_template=[{"name": "tools", "template": "T"}])
    with pytest.raises(ValueError, match="tools and no default"):
        PreferenceTokenizer.load(folder)
