"""Who is calling, and what is theirs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.tenants import namespace_key, suffix_of, tenant_of


@given(st.text(), st.text())
def test_a_namespace_key_says_whose_it_is(tenant: str, suffix: str) -> None:
    """What goes into a key comes out of it, whatever characters it has."""
    key = namespace_key(tenant, suffix)
    assert (tenant_of(key), suffix_of(key)) == (tenant, suffix)
