"""The kernels that make lists of tiles from verdicts: the same text under every mask (see `blocks.py`)."""

from __future__ import annotations

LISTS = '''\
@triton.jit
def tile_lists(list_ptr, verdict_ptr, tiles, CHUNK: tl.constexpr):
    """The list of one block of queries, from its verdicts."""
    row = tl.cast(tl.program_id(0), tl.int64)
    verdict_ptr += row * tiles
    list_ptr += row * (tiles + 3)
    evens, wholes = 0, 0
    for first in tl.range(0, tiles, CHUNK):
        t = first + tl.arange(0, CHUNK)
        verdict = tl.load(verdict_ptr + t, mask=t < tiles, other=0).to(tl.int32)
        evens += tl.reduce((verdict == 3).to(tl.int32), 0, tl.standard._sum_combine)
        wholes += tl.reduce((verdict >= 2).to(tl.int32), 0, tl.standard._sum_combine)
    at_even, at_whole, at_masked = 0, evens, 0
    for first in tl.range(0, tiles, CHUNK):
        t = first + tl.arange(0, CHUNK)
        verdict = tl.load(verdict_ptr + t, mask=t < tiles, other=0).to(tl.int32)
        even, whole, masked = (verdict == 3).to(tl.int32), (verdict == 2).to(tl.int32), (verdict == 1).to(tl.int32)
        nth_even = at_even + tl.associative_scan(even, 0, tl.standard._sum_combine)
        nth_whole = at_whole + tl.associative_scan(whole, 0, tl.standard._sum_combine)
        nth_masked = at_masked + tl.associative_scan(masked, 0, tl.standard._sum_combine)
        tl.store(list_ptr + 2 + nth_even, t, mask=even > 0)
        tl.store(list_ptr + 2 + nth_whole, t, mask=whole > 0)
        tl.store(list_ptr + 3 + tiles - nth_masked, t, mask=masked > 0)
        at_even += tl.reduce(even, 0, tl.standard._sum_combine)
        at_whole += tl.reduce(whole, 0, tl.standard._sum_combine)
        at_masked += tl.reduce(masked, 0, tl.standard._sum_combine)
    tl.store(list_ptr, evens)
    tl.store(list_ptr + 1, wholes)
    tl.store(list_ptr + 2, at_masked)
'''

LISTS_BY_KEY = '''\
@triton.jit
def tile_lists_by_key(list_ptr, verdict_ptr, blocks, tiles, CHUNK: tl.constexpr):
    """The list of one block of keys: which blocks of queries see some of them, whole ones first, masked ones last."""
    pid = tl.cast(tl.program_id(0), tl.int64)
    verdict_ptr += pid // tiles * blocks * tiles + pid % tiles
    list_ptr += pid * (blocks + 3)
    at_whole, at_masked = 0, 0
    for first in tl.range(0, blocks, CHUNK):
        t = first + tl.arange(0, CHUNK)
        verdict = tl.load(verdict_ptr + t.to(tl.int64) * tiles, mask=t < blocks, other=0).to(tl.int32)
        whole, masked = (verdict >= 2).to(tl.int32), (verdict == 1).to(tl.int32)
        nth_whole = at_whole + tl.associative_scan(whole, 0, tl.standard._sum_combine)
        nth_masked = at_masked + tl.associative_scan(masked, 0, tl.standard._sum_combine)
        tl.store(list_ptr + 2 + nth_whole, t, mask=whole > 0)
        tl.store(list_ptr + 3 + blocks - nth_masked, t, mask=masked > 0)
        at_whole += tl.reduce(whole, 0, tl.standard._sum_combine)
        at_masked += tl.reduce(masked, 0, tl.standard._sum_combine)
    tl.store(list_ptr, 0)
    tl.store(list_ptr + 1, at_whole)
    tl.store(list_ptr + 2, at_masked)
'''
