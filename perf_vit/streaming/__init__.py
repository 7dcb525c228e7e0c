"""Forward passes over images of any size, with tokens in memory or in a file."""

from perf_vit.streaming.embedding import ImageTokens
from perf_vit.streaming.forward import check_streamable, stream_tokens
from perf_vit.streaming.layout import TokenLayout
from perf_vit.streaming.store import TokenStore
from perf_vit.streaming.tokens import StreamedTokens

__all__ = ["ImageTokens", "StreamedTokens", "TokenLayout", "TokenStore", "check_streamable", "stream_tokens"]
