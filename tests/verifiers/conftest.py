"""What the tests of the verifier share."""

import pytest

from sg_opd import MathVerifier


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier(timeout=10.0, workers=2)
    yield verifier
    verifier.close()
