"""Hand out pyarrow.compute as Any: its functions are made at import, so type checkers do not see them."""

from __future__ import annotations

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
