"""From a dialogue to a prompt's tokens, for one model; says what the model has no form for."""

from llm_service.prompt.dialogue import Dialogue
from llm_service.prompt.splice import PromptTokens, splice
from llm_service.prompt.template import Template
from llm_service.prompt.tokenizer import Tokenizer
from llm_service.prompt.tools import CALL_END, CALL_START
from shared.errors import NotSupportedByModel


class PromptWriter:
    """Writes prompts by a model's template and tokenizer. Safe to share between threads."""

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self.template = template
        self.tokenizer = tokenizer

    @property
    def knows_tools(self) -> bool:
        """Whether the model has a form for tools and the tokens for it."""
        tokens = (CALL_START, CALL_END)
        return self.template.has_tool_form and all(self.tokenizer.find(token) is not None for token in tokens)

    def write(self, dialogue: Dialogue) -> PromptTokens:
        """Return the prompt's tokens, or raise `NotSupportedByModel`."""
        self.check(dialogue)
        return splice(self.template.render(dialogue), self.tokenizer)

    def write_text(self, text: str) -> PromptTokens:
        """Return the tokens of plain text, without a template."""
        return PromptTokens(tuple(self.tokenizer.encode(text)))

    def check(self, dialogue: Dialogue) -> None:
        """Raise `NotSupportedByModel` if the dialogue needs a form that this model does not have."""
        if dialogue.uses_tools and not self.knows_tools:
            raise NotSupportedByModel("This model has no form for tools.", field="prompt.tools")
        if dialogue.grounding and not self.tokenizer.has_markers:
            raise NotSupportedByModel("This model has no grounding markers.", field="generation_config.grounding")
