"""Which adapter knows which engine."""

from swapserve.config.schema import ModelConfig
from swapserve.engines.base import Adapter, OpenAIAdapter
from swapserve.engines.ollama import OllamaAdapter
from swapserve.engines.sglang import SGLangAdapter
from swapserve.engines.vllm import VllmAdapter


def adapter_for(model: ModelConfig) -> Adapter:
    """Return the adapter that the model's recipe names.

    llama-server has no call that gives GPU memory back: erasing a slot marks its cells as free in a
    cache that stays allocated, and `--sleep-idle-seconds` cannot be triggered from outside.
    Source: llama.cpp, tools/server/README.md.
    """
    match model.recipe.adapter:
        case "vllm":
            return VllmAdapter(model)
        case "sglang":
            return SGLangAdapter(model)
        case "ollama":
            return OllamaAdapter(model)
        case "llamacpp" | "generic":
            return OpenAIAdapter(model)
