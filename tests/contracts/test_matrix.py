from __future__ import annotations

import matrix


def test_the_page_of_exclusions_is_up_to_date():
    assert matrix.PAGE.read_text() == matrix.page(), "run `python tests/contracts/matrix.py`"
