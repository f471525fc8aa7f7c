"""Settings of the simulated marketplace."""

from __future__ import annotations

from typing import Annotated, Literal

from conf.load import meaning, settings


@settings
class MarketplaceRecipe:
    """What the simulated marketplace is like."""

    num_products: Annotated[int, meaning("products in the catalogue", unit="rows", ge=50)] = 2000
    num_queries: Annotated[int, meaning("distinct queries", unit="rows", ge=1)] = 400
    num_sessions: Annotated[int, meaning("search sessions; 0 writes no events", unit="rows", ge=0)] = 20_000
    annotated_products_per_query: Annotated[int, meaning("annotated pairs of a query", unit="pairs", ge=1)] = 24
    marks_per_pair: Annotated[int, meaning("annotators who mark each pair", unit="marks", ge=1)] = 3
    annotator_error_rates: Annotated[
        tuple[Annotated[float, meaning("rate", ge=0, le=1)], ...],
        meaning("share of wrong marks of each annotator; errors by one grade are the commoner", min_length=1),
    ] = (0.05, 0.08, 0.1, 0.12, 0.2)
    annotator_kinds: Annotated[
        tuple[Literal["careful", "spammer", "high", "low"], ...],
        meaning(
            "what the wrong marks of each annotator are: careful, a wrong grade; spammer, any grade, blindly; "
            "high or low, a grade above or below; none given: all careful"
        ),
    ] = ()
    planted_error_share: Annotated[
        float, meaning("annotated pairs whose marks are all wrong", unit="share", ge=0, le=1)
    ] = 0.05
    near_duplicate_share: Annotated[float, meaning("products that repeat another one", unit="share", ge=0, le=1)] = 0.06
    incomplete_share: Annotated[
        float, meaning("chance that a product lacks a given field", unit="share", ge=0, le=1)
    ] = 0.15
    misspelled_query_share: Annotated[float, meaning("queries with a typing error", unit="share", ge=0, le=1)] = 0.12
    broken_row_share: Annotated[
        float, meaning("unusable catalogue lines added, relative to num_products", unit="share", ge=0, le=1)
    ] = 0.0
    results_per_session: Annotated[int, meaning("results shown per session", unit="rows", ge=1, le=24)] = 10
    query_skew: Annotated[float, meaning("exponent of the queries' popularity over rank", ge=0, le=3)] = 0.8
    rank_noise: Annotated[
        float, meaning("what changes a product's rank from session to session; 1 as much as grades do", ge=0, le=3)
    ] = 1.0
    ranker_error: Annotated[
        float, meaning("what keeps a product's rank wrong in all sessions of its query, on the same scale", ge=0, le=3)
    ] = 0.0
    position_bias: Annotated[float, meaning("exponent of examination over position", ge=0, le=3)] = 0.7
    price_effect: Annotated[
        float, meaning("log-odds-like effect of a low price on clicks and purchases", ge=0, le=3)
    ] = 0.3
    popularity_effect: Annotated[float, meaning("effect of popularity on rank and clicks", ge=0, le=3)] = 0.3
    seed: Annotated[int, meaning("the same seed gives the same files", ge=0)] = 7
