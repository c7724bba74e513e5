"""The loops of `kvstore.codecs.batch` as numba compiles them. Importing it imports numba."""

from __future__ import annotations

import numpy as np

from kvstore.codecs.batch import Bytes, Jobs
from kvstore.codecs.registry import BY_FORM_ID, FORM_IDS
from kvstore.kernels import fast16, fastany, nested, quant

_BF16 = FORM_IDS["bfloat16"]


def _results(jobs: Jobs) -> Jobs:
    return np.full(len(jobs), -1, np.int64)


class Numba:
    """`kvstore.codecs.batch.Backend`."""

    def fast_encode(self, form: int, src: Bytes, dst: Bytes, jobs: Jobs) -> Jobs:
        results = _results(jobs)
        if form == _BF16:
            fast16.encode(src, dst, jobs, results)
        else:
            fastany.encode(src, dst, jobs, np.array(BY_FORM_ID[form], np.int64), results)
        return results

    def fast_decode(self, form: int, src: Bytes, dst: Bytes, jobs: Jobs) -> Jobs:
        results = _results(jobs)
        if form == _BF16:
            fast16.decode(src, dst, jobs, results)
        else:
            fastany.decode(src, dst, jobs, np.array(BY_FORM_ID[form], np.int64), results)
        return results

    def quant_encode(self, bits: int, src: Bytes, dst: Bytes, jobs: Jobs, by_row: Bytes) -> Jobs:
        results = _results(jobs)
        quant.encode(src, dst, jobs, bits, by_row, results)
        return results

    def quant_decode(
        self, bits: int, src: Bytes, dst: Bytes, jobs: Jobs, by_row: Bytes, factor: float, shift: float
    ) -> Jobs:
        results = _results(jobs)
        quant.decode(src, dst, jobs, bits, by_row, np.float32(factor), np.float32(shift), results)
        return results

    def nested_encode(self, src: Bytes, dst: Bytes, rest: Bytes, jobs: Jobs, by_row: Bytes) -> Jobs:
        results = _results(jobs)
        nested.encode(src, dst, rest, jobs, by_row, results)
        return results

    def nested_decode(self, src: Bytes, dst: Bytes, rest: Bytes, jobs: Jobs, by_row: Bytes) -> Jobs:
        results = _results(jobs)
        nested.decode(src, dst, rest, jobs, by_row, results)
        return results
