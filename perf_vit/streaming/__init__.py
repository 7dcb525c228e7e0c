"""Forward passes over images of any size, with tokens in memory or in a file."""

from perf_vit.streaming.embedding import ImageTokens
from perf_vit.streaming.forward import StreamedTokens, check_streamable, stream_tokens
from perf_vit.streaming.layout import TokenLayout
from perf_vit.streaming.store import TokenStore

__all__ = ["ImageTokens", "StreamedTokens", "TokenLayout", "TokenStore", "check_streamable", "stream_tokens"]
