"""vLLM configures only loggers below `vllm`."""

from vllm.logger import init_logger

logger = init_logger("vllm.spla_backend")
