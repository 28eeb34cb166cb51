"""Makes tokenizers with the chat templates of many families, and reads dialogs with them."""

from __future__ import annotations

from tensordict import TensorDict
from tokenizers.processors import TemplateProcessing
from torchrl.data.llm.history import _CHAT_TEMPLATES
from torchrl.modules.llm.policies import Text

from tests.batches import history_batch
from vllm_kl.batch.read_tokens import InputKeys, read_batch
from vllm_kl.demo.task import make_tokenizer

SPECIALS = [
    *(
        "<s>",
        "</s>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<eos>",
    ),
    *(
        "<|end|>",
        "<|return|>",
        "<|start|>",
        "<|message|>",
        "<|channel|>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
    ),
]


def say(role, content, **others):
    return {"role": role, "content": content, **others}


def make(template, *, eos="<|im_end|>", bos=None, adds=None):
    """A byte-level tokenizer with special tokens of many families. ``adds``: tokens around every text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS, "eos_token": eos})
    if bos is not None:
        tokenizer.bos_token = bos
    if adds is not None:
        names = [(name, tokenizer.convert_tokens_to_ids(name)) for name in adds.split() if name != "$A"]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=names)
    tokenizer.chat_template = template
    return tokenizer


def read(tokenizer, *chats, assistant_only=True, **template_kwargs):
    options = {"chat_template": tokenizer.chat_template, **template_kwargs}
    keys = InputKeys(
        input_mode="history", key=("history", "full"), tokenizer=tokenizer, template_kwargs=options
    )
    return read_batch(history_batch(chats=list(chats)), keys, assistant_only=assistant_only)


def read_texts(tokenizer, *texts, **options):
    keys = InputKeys(input_mode="text", key=("text", "full"), tokenizer=tokenizer, tokenizer_kwargs=options)
    td = TensorDict(text=Text(full=list(texts)), batch_size=(len(texts),)).to_lazystack(0)
    batch = read_batch(td, keys, assistant_only=False)
    return [ids.tolist() for ids in batch.token_ids], batch.report


def kept(tokenizer, batch):
    """Return the text of the tokens that count, for each sample."""
    return [tokenizer.decode(ids[keep]) for ids, keep in zip(batch.token_ids, batch.keep, strict=True)]


# Stand-ins of the families' templates: what they cut, trim, move and end turns with.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation "
    "%}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ "
    "'\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% set day = date_string if date_string is defined else strftime_now('%d %b %Y') %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + day + '\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] "
    "%}{% endif %}"
    "{{ '<|eot_id|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{{ '<|eot_id|>' }}{% endgeneration "
    "%}"
    "{% else %}{{ m.content | trim }}{{ '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{%- set system = '' %}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + "
    "'\n\n' %}"
    "{%- set messages = messages[1:] %}{%- endif %}{{- bos_token }}{%- for m in messages %}{%- if m.role == "
    "'user' %}"
    "{%- set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{- '[INST] ' + (system if m == last else '') + m.content + '[/INST]' }}"
    "{%- else %}{% generation %}{{- ' ' + m.content + eos_token }}{% endgeneration %}{%- endif %}{%- endfor "
    "%}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') "
    "}}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}{% generation %}{{ m.content | trim }}{{ "
    "'<end_of_turn>\n' }}"
    "{% endgeneration %}{% else %}{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + "
    "'<end_of_turn>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = "
    "loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set c = m.content if loop.index0 > ns.last else m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% generation %}{{ c + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% "
    "endif %}{{ '\n' }}"
    "{% endfor %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor "
    "%}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% elif m.role == 'assistant' %}{{ "
    "'<|assistant|>' }}{% generation %}"
    "{{ m.content.split('</think>')[-1] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}{{ "
    "m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
HARMONY = (  # drops the analysis channel of all turns but the last
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else '<|channel|>final' + m.content.split('<|channel|>final')[-1] }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endgeneration %}{% else %}{{ '<|message|>' + "
    "m.content + '<|end|>' }}"
    "{% endif %}{% endfor %}"
)
FAMILIES = {
    "chatml": make(CHATML),
    "llama3": make(LLAMA3, eos="<|eot_id|>", bos="<s>"),
    "mistral": make(MISTRAL, eos="</s>", bos="<s>"),
    "gemma": make(GEMMA, eos="<eos>", bos="<s>"),
    "qwen3": make(QWEN3),
    "r1": make(R1, eos="</s>", bos="<s>"),
    "phi3": make(PHI3, eos="</s>"),
    "harmony": make(HARMONY, eos="<|return|>"),
    **{f"torchrl-{name}": make(text, bos="<s>") for name, text in _CHAT_TEMPLATES.items()},
}
TURNS = [say("user", "2 + 2?"), say("assistant", "four"), say("user", "and one?"), say("assistant", "a")]
THINK = "<think>\nTwo and two, that is four.\n</think>\n\n"
THOUGHT = [m if m["role"] == "user" else say("assistant", THINK + m["content"]) for m in TURNS]


def figures(batch):
    """Return the metrics of a batch's report that are not 0."""
    return {
        name.removeprefix("template_"): int(value) for name, value in batch.report.metrics.items() if value
    }


def tool_call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
