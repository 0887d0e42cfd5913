"""Who is calling, and what is theirs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.tenants import ANONYMOUS, PUBLISHED, namespace_key, suffix_of, tenant_of
from prefixcache.names import TENANT_NAME


@given(st.text(), st.text())
def test_a_namespace_key_says_whose_it_is(tenant: str, suffix: str) -> None:
    """What goes into a key comes out of it, whatever characters it has."""
    key = namespace_key(tenant, suffix)
    assert (tenant_of(key), suffix_of(key)) == (tenant, suffix)


@given(
    st.sampled_from("ab:,01"), st.text("ab:,01", max_size=12), st.sampled_from("ab:,01"), st.text("ab:,01", max_size=12)
)
def test_no_two_pairs_have_one_key(tenant: str, suffix: str, other: str, another: str) -> None:
    """However a suffix is put together from the parts of keys."""
    same = namespace_key(tenant, suffix) == namespace_key(other, another)
    assert same == ((tenant, suffix) == (other, another))


@given(st.text(min_size=1), st.text())
def test_no_tenant_reaches_what_is_published_by_a_name(tenant: str, suffix: str) -> None:
    """It belongs to a tenant without a name, and there is none."""
    assert namespace_key(tenant, suffix) != PUBLISHED
    assert tenant_of(PUBLISHED) == ""
    assert not TENANT_NAME.fullmatch("")
    assert TENANT_NAME.fullmatch(ANONYMOUS)
