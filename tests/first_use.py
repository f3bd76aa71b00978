"""What libraries do once, when they are first used: done before processes fork, so that each need not do it again. It starts no thread."""

import gc

import numba
from pydantic import BaseModel


class Block(BaseModel):
    x: int = 0


Block.model_json_schema()
numba.njit("f8(f8)")(lambda x: x + 1.0)  # numba reads its tables of types and functions
gc.collect()
gc.freeze()  # what is there by now stays: no search for garbage goes through it again
