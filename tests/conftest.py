"""What all tests share: none sees what another compiled."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

THINNED = {
    "test_ahead.py::test_all_kernels_of_a_call_are_compiled": 3,
    "test_attention.py": 7,
    "test_attention_dropout.py::test_values_and_gradients": 6,
    "test_backward.py": 9,
    "test_backward.py::test_tiles_of_a_list_that_end_beyond_the_last_row_or_key": 4,
    "test_backward_bias.py": 9,
    "test_backward_distances.py": 2,
    "test_backward_work.py::test_tiles_that_the_forward_leaves_out_are_left_out_of_every_gradient": 3,
    "test_bias_act_dropout.py": 6,
    "test_bias_models.py": 17,
    "test_blocks.py": 7,
    "test_cache.py::test_a_changed_kernel_is_seen_before_it_runs": 3,
    "test_dead_rows.py": 6,
    "test_decode.py": 12,
    "test_depth.py::test_products_add_up_enough": 3,
    "test_diagonal.py": 3,
    "test_diagonal.py::test_a_bias_of_distances_is_a_vector": 6,
    "test_diagonal.py::test_what_is_learned_of_distances_alone_is_told_apart": 3,
    "test_distances_by_sdpa.py": 12,
    "test_dropout.py::test_what_a_result_keeps_its_gradients_keep": 3,
    "test_dynamic.py::test_a_second_compilation_serves_all_further_lengths": 2,
    "test_dynamic.py::test_one_compilation_serves_all_batches_and_lengths": 5,
    "test_dynamic.py::test_one_compilation_serves_dimensions_that_are_marked": 2,
    "test_elementwise.py": 2,
    "test_far_masks.py": 12,
    "test_far_positions.py::test_distances_are_subtracted_before_they_are_scaled": 8,
    "test_fuzz.py::test_random_programs_equal_eager": 10,
    "test_gated_mlp.py": 5,
    "test_gated_models.py": 3,
    "test_gated_near_misses.py": 5,
    "test_gated_spellings.py": 4,
    "test_generate.py": 4,
    "test_generated_source.py::test_constants_are_what_they_are_or_are_declined": 10,
    "test_gradients.py::test_a_bias_of_any_broadcast_shape_gets_its_gradient": 3,
    "test_gradients.py::test_deterministic_algorithms_give_the_same_numbers_each_time": 3,
    "test_gradients.py::test_what_a_score_learns_gets_its_gradient": 2,
    "test_guards.py": 6,
    "test_hopper_backward.py": 3,
    "test_hopper_forward_text.py": 4,
    "test_hopper_variant.py": 3,
    "test_layout.py::test_what_is_computed_of_a_result_lies_as_it_did": 2,
    "test_loops.py": 3,
    "test_loops.py::test_a_length_that_changes_under_way": 2,
    "test_loops.py::test_compiled_autograd_hands_a_list_to_the_graph_of_a_backward": 2,
    "test_loops.py::test_many_lengths_by_one_compilation": 2,
    "test_masked_weights.py": 4,
    "test_masks.py": 3,
    "test_memory.py::test_autograd_keeps_no_weights": 3,
    "test_memory.py::test_memory_of_kernels_grows_with_lengths_not_with_scores": 3,
    "test_memory.py::test_nothing_of_a_step_has_an_element_for_each_query_and_key": 4,
    "test_memory.py::test_what_is_kept_is_q_k_v_the_result_its_log_sum_exps_and_what_is_loaded": 4,
    "test_models.py": 6,
    "test_package.py::test_transformers_works_from_the_repositorys_root": 2,
    "test_philox.py::test_a_tile_keeps_what_the_reference_keeps": 2,
    "test_positions_from_data.py::test_what_is_compared_with_data": 4,
    "test_replace.py::test_of_a_mask_of_parts_none_is_read_beyond_its_end": 3,
    "test_rows.py": 3,
    "test_rows.py::test_derivatives_are_those_of_finite_differences": 3,
    "test_rows.py::test_gradients_of_rows_whose_masks_were_added": 3,
    "test_rows.py::test_rows_whose_masks_were_added_to_keys_with_a_mean": 3,
    "test_scopes.py": 2,
    "test_soft.py::test_an_error_leaves_the_program_as_it_was": 3,
    "test_soft_families.py::test_an_error_leaves_a_site_as_it_was_and_strict_raises_it": 3,
    "test_spellings.py::test_matched_and_equal_to_eager": 2,
    "test_tables.py::test_gradients_of_tables": 12,
    "test_window_masks.py::test_what_is_learned_of_each_window_has_its_gradient": 3,
    "test_windows.py::test_both_orders_of_batches_and_heads": 2,
    "test_windows.py::test_the_sum_over_batches_is_that_of_its_parts": 4,
}
"""Long tables, by their file or by it and a function, of which one case in so many runs each time, and the first of
each function; the others are `slow`: they vary what these do too."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run one test in so many of each file: a first look")


def _file(item: pytest.Item) -> str:
    return item.path.name


def _function(item: pytest.Item) -> str:
    return f"{item.path.name}::{getattr(item, 'originalname', item.name)}"


def numbered(items: list[pytest.Item], table: Callable[[pytest.Item], str]) -> list[tuple[int, pytest.Item]]:
    """Each with its number in its table."""
    numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
    return [(next(numbers[table(item)]), item) for item in items]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = config.getoption("--every")
    items[:] = [item for number, item in numbered(items, _file) if number % every == 0]
    first = {id(item) for number, item in numbered(items, _function) if number == 0}
    for table in (_file, _function):
        for number, item in numbered(items, table):
            if number % THINNED.get(table(item), 1) and id(item) not in first:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
