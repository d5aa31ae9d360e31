"""CSRF tokens: each is masked anew, and no other text is valid."""

import ast
import inspect
import secrets

import hypothesis.strategies as st
from hypothesis import given

from rss import csrf
from rss.csrf import CSRFTokens

TOKENS = CSRFTokens()
SECRETS = st.binary(min_size=32, max_size=32)


@given(secret=SECRETS, other=SECRETS)
def test_a_token_is_of_its_secret(secret: bytes, other: bytes) -> None:
    """A token is valid for its own secret only, and looks different each time."""
    token = TOKENS.create(secret)
    assert TOKENS.verify(secret, token)
    assert TOKENS.create(secret) != token
    assert TOKENS.verify(other, token) == (other == secret)


@given(secret=SECRETS, token=st.one_of(st.text(), st.text(st.sampled_from("aZ09_-+/="), min_size=84, max_size=88)))
def test_nothing_else_is_a_token(secret: bytes, token: str) -> None:
    """No other text is a valid token, and verifying it never raises."""
    assert not TOKENS.verify(secret, token)
    assert not TOKENS.verify(secret, None)
    assert not TOKENS.verify(secret, token.encode("utf-8", "replace"))  # type: ignore[arg-type]


@given(secret=SECRETS, at=st.integers(0, 84), mark=st.sampled_from("aZ09_-"))
def test_a_changed_token_is_none(secret: bytes, at: int, mark: str) -> None:
    """A token with a changed character is invalid. The last one is not tested, since not all of its bits count."""
    token = TOKENS.create(secret)
    assert TOKENS.verify(secret, token[:at] + mark + token[at + 1 :]) == (token[at] == mark)


def test_a_token_is_masked() -> None:
    """Tokens of one secret differ at each position, so they do not reveal the secret."""
    secret = secrets.token_bytes(32)
    tokens = [TOKENS.create(secret) for _ in range(200)]
    for at in range(85):
        assert len({token[at] for token in tokens}) > 20


def test_tokens_are_compared_in_constant_time() -> None:
    """Tokens are compared by `compare_digest`, and nothing is compared by `==`."""
    tree = ast.parse(inspect.getsource(csrf))
    assert any(isinstance(node, ast.Attribute) and node.attr == "compare_digest" for node in ast.walk(tree))
    assert not any(isinstance(node, ast.Eq) for node in ast.walk(tree))
