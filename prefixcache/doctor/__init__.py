"""Finds what keeps prompts from sharing their beginnings, and says what moving it would save.

    texts or shapes of prompts
      -> pieces      words, numbers, dates, ids, spaces ...       (pieces, prompts)
      -> orders      the same JSON keys, tools or items in another order
      -> groups      prompts that are alike, aligned with the first of them   (alignment)
      -> spots       where they vary and then go on alike
      -> plans       how each prompt would be written instead     (rewriting)
      -> a report    the hit rate of a real cache, today and then (simulation, diagnosis)

Everything works on hashes, kinds and lengths of pieces; text is only used to show
examples and to write prompts anew. So the same findings come from prompts in a file and
from a server that tells nothing but shapes. Nothing here needs a server.
"""

from prefixcache.doctor.diagnosis import DEFAULT_BLOCK_SIZE, Diagnosis
from prefixcache.doctor.pieces import Pieces
from prefixcache.doctor.prompts import Prompt, prompt_from, prompt_from_shape, read_prompts, sendable
from prefixcache.doctor.report import Example, Finding, Place, Report, Share

__all__ = [
    "DEFAULT_BLOCK_SIZE",
    "Diagnosis",
    "Example",
    "Finding",
    "Pieces",
    "Place",
    "Prompt",
    "Report",
    "Share",
    "prompt_from",
    "prompt_from_shape",
    "read_prompts",
    "sendable",
]
