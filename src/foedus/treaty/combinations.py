"""The validity matrix: which features of federated learning go together, under which condition, and which never do.

One table, from which `foedus check`, `foedus list combinations`, docs/validity.md and the tests are made. Two rules
cover most of it. What is summed in secret must be a vector of fixed length whose meaning is a *sum*. And whatever
interprets it (scale, support, seed, weights, model) must be public, the same for the cohort, and bound to the masks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .features import FEATURES, feature_named

Names = tuple[str, ...]


@dataclass(frozen=True)
class Combination:
    """`of`: the features that meet, each one or one of several. `instead`: the condition where the verdict is
    "conditional", the nearest sound alternative where it is "refuse". `held_by`: where the code enforces it
    ("file.py::name"); `tests`: which show that it does.
    """

    number: int
    of: tuple[Names, ...]
    verdict: Literal["accept", "conditional", "refuse"]
    reason: str
    instead: str
    held_by: Names
    tests: Names

    @property
    def name(self) -> str:
        """The features in words: "masked-sums + krum, multi-krum"."""
        return " + ".join(", ".join(names) for names in self.of)

    def met(self, features: Iterable[str]) -> str:
        """Those of these features that meet here: "masked-sums + krum"."""
        there = set(features)
        return " + ".join(", ".join(name for name in names if name in there) for names in self.of)

    @property
    def said(self) -> str:
        """The verdict in a sentence."""
        if self.verdict == "refuse":
            return f"refused: {self.reason} Instead: {self.instead}"
        return f"accepted: {self.reason}" if self.verdict == "accept" else f"accepted if {self.instead} {self.reason}"

    def applies(self, features: Iterable[str]) -> bool:
        """Whether all that it speaks of is among these."""
        there = set(features)
        return all(there & set(names) for names in self.of)


def decide(features: Iterable[str]) -> tuple[Combination, ...]:
    """The combinations among these features, by number.

    >>> [(row.number, row.verdict) for row in decide({"masked-sums", "krum", "random-k"})]
    [(8, 'accept'), (13, 'refuse')]
    """
    there = frozenset(features)
    return tuple(row for row in COMBINATIONS if row.applies(there))


def advice(word: str) -> str:
    """What the matrix says about something that treaties cannot name yet; "" where it does not know the word."""
    feature = feature_named(word)
    rows = [row for row in COMBINATIONS if any(feature in names for names in row.of)]
    if feature is None or FEATURES[feature].key or not rows:
        return ""
    row = min(rows, key=lambda row: (row.verdict != "refuse", row.verdict == "accept"))
    others = " and ".join(names[0] for names in row.of if feature not in names)
    more = f" `foedus check --with {feature}` tells about other combinations." if len(rows) > 1 else ""
    return f"This version has no {feature} ({FEATURES[feature].about}). With {others} it is {row.said}{more}"


_SECURE = ("masked-sums", "encrypted-sums")
_SINGLE = ("krum", "multi-krum", "bulyan", "flame")
_ORDER = ("median", "trimmed-mean")
_ROBUST = (*_SINGLE, *_ORDER)
_STACKED = ("flora", "fedex-lora", "flora-na")

_CHAIN = ("stages/base.py::Chain",)
_FEDERATION = ("loop.py::Federation",)
_NAMES = ("treaty/mistakes.py::_of_the_matrix",)

_HERE = "tests/test_validity.py::"
_BOUND = (
    f"{_HERE}test_model_cohort_and_settings_are_in_the_digest_that_masks_are_bound_to",
    "tests/secure/test_silo.py::test_every_seed_and_key_depends_on_all_that_the_parties_must_have_seen_alike",
)
_SHARES = "tests/privacy/test_shares.py::"
_CODES = (f"{_HERE}test_what_does_not_add_up_cannot_be_hidden",)
_LINEAR = (f"{_HERE}test_public_linear_maps_may_be_hidden_and_their_sum_decodes_to_the_sum",)
_RULES = (f"{_HERE}test_a_rule_that_looks_at_single_updates_cannot_be_built_where_they_are_hidden",)
_TOLD = (f"{_HERE}test_a_treaty_that_names_what_we_do_not_have_is_told_why_and_what_instead",)
_WIRE = ("tests/test_secure_run.py::"
         "test_nothing_leaves_a_silo_but_the_masked_vector_and_protocol_messages_of_fixed_size",)  # fmt: skip
_SUMS = ("tests/test_treaty_errors.py::test_secure_sums_that_would_hide_nothing_are_refused",)
_BEHIND = ("tests/test_methods_run.py::test_a_method_behind_masks_is_the_one_in_the_open_up_to_the_grid",)
_METHODS = ("tests/test_treaty_errors.py::test_a_method_that_would_not_hold_is_refused",)
_PRIVACY = ("tests/test_treaty_errors.py::test_a_privacy_section_that_would_not_hold_is_refused",)

COMBINATIONS = (
    Combination(
        1, (("masked-sums",), ("mean",), ("public-weights",)), "accept",
        "A mean with public weights needs only the sum.",
        "", ("server/aggregators.py::WeightedMean",),
        (f"{_HERE}test_secure_means_can_be_asked_for",
         "tests/test_secure_run.py::test_a_masked_run_ends_where_plain_integer_addition_does"),
    ),
    Combination(
        2, (("masked-sums",), ("example-weights",)), "conditional",
        "How many examples a silo has is private.",
        "the weight is a coordinate of the same masked sum, max_weight at most, and no count stands beside it.",
        ("treaty/rules.py::_a_weight_with_an_end", "treaty/rules.py::_no_counts_beside_a_sum"),
        (*_SUMS, f"{_HERE}test_a_weight_is_a_coordinate_of_the_sum", *_WIRE),
    ),
    Combination(
        3, (("masked-sums",), ("uniform-quantization",)), "conditional",
        "Integers add up only on one grid, and a sum that wraps is wrong without a sign of it.",
        "scale, layout and word are public and the cohort's own, and each silo keeps within its part of the word.",
        ("stages/words.py::room", "treaty/rules.py::_room_in_a_word"),
        (*_SUMS, "tests/stages/test_words.py::test_one_unit_beyond_the_room_is_refused_and_nothing_wraps"),
    ),
    Combination(
        4, (("masked-sums",), ("block-quantization",)), "conditional",
        "Numbers on scales of each silo's own do not add up.",
        "each block has one public scale: from the last release, from the clip norm, or from a secure maximum.",
        _CHAIN, _CODES,
    ),
    Combination(
        5, (("masked-sums",), ("nf4",)), "refuse",
        "Codes of unevenly spaced numbers do not add up.",
        "round to one uniform grid on the way up; NF4 is for the frozen base and the way down.",
        _CHAIN, _CODES,
    ),
    Combination(
        6, (("masked-sums",), ("entropy-coding",)), "refuse",
        "What is masked looks random, so that nothing is left to pack; a code of variable length before the masks tells"
        " by its length, and does not add up.",
        "codes of fixed length: a smaller word (word = 16).",
        _CHAIN, (*_CODES, f"{_HERE}test_nothing_comes_after_what_hides"),
    ),
    Combination(
        7, (("masked-sums",), ("top-k",)), "refuse",
        "Which coordinates a silo chose tells about its data, and the choices of two silos do not add up.",
        "random-k from a public seed, or coordinates that the coordinator announces from earlier releases.",
        _CHAIN, _CODES,
    ),
    Combination(
        8, (("masked-sums",), ("random-k",)), "accept",
        "All send the same coordinates; what error feedback keeps stays in the silo.",
        "", _CHAIN, _LINEAR,
    ),
    Combination(
        9, (("masked-sums",), ("linear-sketch",)), "accept",
        "The sketch of a sum is the sum of the sketches, where the seed is shared.",
        "", _CHAIN, _LINEAR,
    ),
    Combination(
        10, (("masked-sums",), ("powersgd",)), "conditional",
        "The second factor depends on the sum of the first.",
        "there are two secure sums a round with one public Q, and its rank is that of the sum; below, plain averages of"
        " factors are better.",
        _CHAIN, _CODES,
    ),
    Combination(
        11, (("masked-sums",), ("seed-scalars",)), "accept",
        "One number for each public direction is a dense vector that adds up: 4,096 of 16 bits are 8 kB.",
        "", _CHAIN, _LINEAR,
    ),
    Combination(
        12, (("masked-sums",), ("layer-budget",)), "conditional",
        "Bits and coordinates must agree in the whole cohort.",
        "they are found from what was released, and sent as settings of the task to which the masks are bound.",
        ("types.py::Task", "secure/silo.py::Member"), _BOUND,
    ),
    Combination(
        13, (("masked-sums",), _SINGLE), "refuse",
        "The rule needs single updates, or the distances between them.",
        "robust rules over the sums of groups (group_size), which are to come; or distances from secret shares"
        " (ByzSecAgg, RFLPA).",
        _FEDERATION, _RULES,
    ),
    Combination(
        14, (("masked-sums",), _ORDER), "refuse",
        "The order of single updates, coordinate by coordinate, is not in their sum.",
        "robust rules over the sums of groups (group_size), which are to come.",
        _FEDERATION, _RULES,
    ),
    Combination(
        15, (_SECURE, ("groups",)), "conditional",
        "A silo hides in its group alone, and one bad silo spoils all of its group.",
        "groups keep [cohort] minimum silos after dropout, are drawn by joint randomness and not by the coordinator,"
        " and are stated as the anonymity set; a robust rule over b groups bears fewer than b / 2 bad silos.",
        ("treaty/rules.py::_groups_large_enough", "treaty/words.py::_crowd"),
        (*_SUMS, f"{_HERE}test_the_statement_names_the_group_in_which_a_silo_hides",
         "tests/test_secure_run.py::test_groups_are_drawn_by_what_no_party_chooses"),
    ),
    Combination(
        16, (("masked-sums",), ("geometric-median",)), "conditional",
        "Weiszfeld's weights need single distances, which silos can find by themselves.",
        "there are several secure sums a round, of w x and of w, and silos are trusted to compute their weight.",
        _FEDERATION, _RULES,
    ),
    Combination(
        17, (("masked-sums",), ("norm-bound",)), "conditional",
        "The coordinator cannot see norms.",
        "silos clip by themselves and are trusted to (never call it Byzantine-robust), or prove it (RoFL, ACORN).",
        (*_FEDERATION, "treaty/words.py::_sums"),
        (*_RULES, f"{_HERE}test_the_statement_says_that_silos_can_spoil_a_sum"),
    ),
    Combination(
        18, (("masked-sums",), ("fltrust",)), "conditional",
        "The rule needs the cosine of each update with the trusted one.",
        "cosines are computed on secret shares (RFLPA).",
        _FEDERATION, _RULES,
    ),
    Combination(
        19, (("masked-sums",), ("clustering",)), "refuse",
        "The coordinator would need the likeness of single updates.",
        "each silo picks its cluster by its own loss (IFCA), and every cluster of at least minimum silos has a secure"
        " sum; which cluster it chose becomes known.",
        _FEDERATION, _RULES,
    ),
    Combination(
        20, (("masked-sums",), ("reputation",)), "conditional",
        "There is no sign of a single silo to score.",
        "scores come from the protocol alone (failed checks, bad signatures, silence), or from groups drawn anew.",
        _FEDERATION, _RULES,
    ),
    Combination(
        21, (("masked-sums",), ("asynchronous",)), "conditional",
        "Masks cancel only within a cohort that was fixed beforehand.",
        "updates of one model wait for a cohort, which then has one secure sum; staleness weighs as in 2.",
        ("gather/base.py::ask",), (f"{_HERE}test_every_silo_of_a_cohort_is_sent_the_same_task", *_TOLD),
    ),
    Combination(
        22, (_SECURE, ("silo-metrics",)), "conditional",
        "A loss beside a masked update tells about the silo by itself.",
        "losses and measures are coordinates of a secure sum of at least minimum silos, and none has a silo's name.",
        ("sums.py::measures", "treaty/words.py::_evaluations"),
        (f"{_HERE}test_losses_and_measures_leave_in_a_sum_alone", *_WIRE,
         "tests/test_secure_run.py::test_masked_evaluation_sums_are_those_of_open_evaluation"),
    ),
    Combination(
        23, (_SECURE, ("varying-cohorts",)), "conditional",
        "Two sums over nearly the same silos differ by what the others sent.",
        "every sum is of at least minimum ≥ 3 silos; only a guarantee ([privacy]) limits what many sums tell together.",
        ("treaty/rules.py::_enough_for_a_secret", "treaty/words.py::_sums"),
        (*_SUMS, "tests/secure/test_messages.py::"
         "test_an_agreement_that_would_show_less_than_two_honest_silos_cannot_be_made",
         "tests/test_secure_run.py::test_too_few_survivors_end_the_round_before_anything_is_opened",
         f"{_HERE}test_the_statement_says_that_sums_can_be_subtracted"),
    ),
    Combination(
        24, (("masked-sums",), ("distributed-noise",), ("continuous-noise",)), "refuse",
        "Shares of floating-point noise are not integers: rounded, they do not add up to the noise that is charged, and"
        " their low bits give values away.",
        'integer shares: noise = "discrete-gaussian".',
        ("treaty/rules.py::_nothing_that_the_matrix_refuses",),
        (*_SUMS, f"{_HERE}test_a_treaty_with_a_refused_pair_is_told_the_rows_reason_and_its_alternative"),
    ),
    Combination(
        25, (("masked-sums",), ("distributed-noise",)), "conditional",
        "The shares of silos that vanish are missing, and colluders can take theirs off.",
        "shares are scaled for minimum less the colluding silos, rounding is in the bound, and fewer abort the round.",
        ("treaty/rules.py::_enough_for_a_secret", "privacy/plan.py::Terms"),
        (*_SUMS, f"{_SHARES}test_any_shares_of_the_fewest_honest_silos_make_the_noise_whole_and_more_add_to_it",
         f"{_SHARES}test_with_fewer_shares_than_the_plan_says_the_noise_is_not_whole",
         f"{_SHARES}test_noise_covers_the_length_that_rounding_adds_to_a_silos_update"),
    ),
    Combination(
        26, (("distributed-noise",), ("modular-sums",)), "conditional",
        "A sum that wraps costs no privacy, and is worth nothing.",
        "the word has room for the clip, the rounding and the tails of the noise, by proof, and none may wrap.",
        ("privacy/shares.py::fitted", "stages/words.py::Layout"),
        (f"{_SHARES}test_no_sum_of_numbers_and_noise_can_wrap",
         f"{_SHARES}test_a_draw_that_is_too_long_ends_the_silos_round_and_nothing_leaves"),
    ),
    Combination(
        27, (("differential-privacy",), ("top-k",)), "conditional",
        "Which coordinates are the largest depends on the data.",
        "the choice is made after the noise, from what is released; or coordinates are drawn (random-k).",
        _NAMES, _TOLD,
    ),
    Combination(
        28, (("differential-privacy",), ("error-feedback",)), "conditional",
        "What was left out of one release comes with a later one.",
        "update and residual are clipped together in every round; no amplification by sampling holds for examples.",
        _NAMES, _TOLD,
    ),
    Combination(
        29, (("differential-privacy",), ("lora-both-factors",)), "conditional",
        "The noise of one factor is multiplied by that of the other.",
        "you can bear it: the guarantee holds, for one norm over both factors; freeze_a = true trains one of them.",
        ("privacy/steps.py::parts_of",), ("tests/privacy/test_plan.py::test_parts_share_one_budget_and_one_norm",),
    ),
    Combination(
        30, (("differential-privacy",), ("example-weights",)), "conditional",
        "Weights multiply what one unit can do, and are private themselves.",
        'weighting = "uniform", and the mean is divided by a public count.',
        ("treaty/rules.py::_uniform_weights", "privacy/plan.py::aggregator"),
        (*_PRIVACY, "tests/privacy/test_plan.py::test_the_mean_is_divided_by_a_public_count"),
    ),
    Combination(
        31, (("differential-privacy",), ("asynchronous",)), "conditional",
        "How often a unit takes part is not known beforehand.",
        "participation is bounded and paid for (b-min separation, DP-FTRL).",
        _NAMES, _TOLD,
    ),
    Combination(
        32, (("differential-privacy",), ("adaptive-clip", "layer-budget")), "conditional",
        "What adapts reads the data.",
        "the quantile is released with noise, and charged by the same multiplier.",
        ("stages/clip.py::Clip", "privacy/steps.py::Following"),
        ("tests/privacy/test_checklist_items.py::"
         "test_the_bit_that_moves_a_clip_norm_is_paid_for_by_the_same_multiplier",),
    ),
    Combination(
        33, (("differential-privacy",), _ROBUST), "conditional",
        "Noise widens the spread that the rule relies on, and one silo moves a median otherwise than a mean.",
        "the rule has a bound of its own that is charged for, and a compression made for it (Fed-DPRoC).",
        ("privacy/mechanisms.py::Gaussian",), (f"{_HERE}test_a_rule_without_a_bound_gets_no_noise",),
    ),
    Combination(
        34, (("encrypted-sums",), ("mean",)), "accept",
        "A mean needs additions alone: parameters without multiplications are 2.5 times smaller.",
        "", ("server/aggregators.py::WeightedMean",),
        (f"{_HERE}test_secure_means_can_be_asked_for",
         "tests/test_encrypted_run.py::test_an_encrypted_run_ends_where_plain_integer_addition_does"),
    ),
    Combination(
        35, (("encrypted-sums",), ("shared-secret-key",)), "conditional",
        "One silo with the key and the coordinator together read every update.",
        "you can rule that out; the statement says so. Threshold keys would need several to agree.",
        ("secure/backends.py::trust", "secure/backends.py::threshold_keys", "silo/keyring.py::Keyring"),
        (f"{_HERE}test_the_statement_of_encrypted_sums_says_who_must_not_collude",
         "tests/silo/test_keyring.py::"
         "test_a_silo_encrypts_under_no_key_but_that_which_a_holder_signed_for_this_session",
         "tests/silo/test_keyring.py::"
         "test_a_sum_is_opened_once_whoever_asks_and_however_often_the_silo_restarts",
         "tests/secure/test_homomorphic.py::test_threshold_keys_are_refused_with_the_reason"),
    ),
    Combination(
        36, (("encrypted-sums",), ("ckks",)), "conditional",
        "Decrypted approximate numbers give the key away to whoever has the ciphertexts too (Li and Micciancio 2021).",
        "the sum stays with the silo that decrypts it. Here the coordinator gets it, so treaties must say bfv, which is"
        " exact.",
        ("treaty/rules.py::_an_exact_scheme", "secure/backends.py::check"),
        (*_SUMS, "tests/secure/test_homomorphic.py::"
         "test_a_treaty_cannot_send_approximate_sums_back_to_the_coordinator"),
    ),
    Combination(
        37, (("encrypted-sums",), ("selective-encryption",)), "conditional",
        "What is not encrypted leaks, and the choice of what is can depend on the data.",
        "the choice is made on public data, and the rest is masked: no number ever leaves in the clear. Runs cannot do"
        " both at once yet, and refuse.",
        ("stages/encrypt.py::Encrypt", "treaty/words.py::_hidden", "sums.py::_can_be_encrypted"),
        ("tests/stages/test_encrypt.py::test_a_selection_alone_hides_nothing",
         "tests/test_encrypted_run.py::test_what_no_run_can_keep_yet_is_refused_when_it_is_built",
         f"{_HERE}test_what_is_not_encrypted_is_said_to_be_masked"),
    ),
    Combination(
        38, (("encrypted-sums",), _ROBUST), "refuse",
        "Comparisons under encryption are not practical.",
        "inner products and norms alone (AegisFL), or robust rules over the sums of groups.",
        _FEDERATION, _RULES,
    ),
    Combination(
        39, (("encrypted-sums",), ("masked-sums",)), "refuse",
        "Either hides the update; both cost twice.",
        'sums = "masked" or sums = "encrypted"; with encrypted_share the numbers are divided between them.',
        _CHAIN, (f"{_HERE}test_nothing_comes_after_what_hides",),
    ),
    Combination(
        40, (("encrypted-sums",), ("uniform-quantization", "block-quantization", "nf4", "top-k", "entropy-coding")),
        "conditional",
        "What does not add up in the open does not under encryption (3 to 7).",
        "what is encrypted are integers on one public grid, packed with head-room for the sum.",
        (*_CHAIN, "secure/packing.py::Packing"),
        (*_CODES, "tests/secure/test_homomorphic.py::test_everybody_at_the_limit_gives_the_exact_sum"),
    ),
    Combination(
        41, (_ROBUST, ("uniform-quantization", "block-quantization", "top-k"), ("open-sums",)), "conditional",
        "Distances are bent by what compression left out.",
        "updates are decompressed before the rule, and the compression is unbiased.",
        _NAMES, _TOLD,
    ),
    Combination(
        42, (_ROBUST, ("non-iid",)), "conditional",
        "Honest silos with unusual data are taken for attackers.",
        "updates are mixed with their neighbours first (NNM, bucketing).",
        _NAMES, _TOLD,
    ),
    Combination(
        43, (_ROBUST, ("asynchronous",)), "conditional",
        "Late updates look like attacks.",
        "updates are buffered, and scaled for their age.",
        _NAMES, _TOLD,
    ),
    Combination(
        44, (("clustering", "reputation"), ("differential-privacy",)), "conditional",
        "Both read the data.",
        "they see nothing but what was released.",
        _NAMES, _TOLD,
    ),
    Combination(
        45, (_SECURE, _STACKED), "refuse",
        "The method needs the factors of each silo.",
        "averages of factors: exact with freeze_a = true (FFA-LoRA), or with one factor at a time (RoLoRA).",
        _FEDERATION, _RULES,
    ),
    Combination(
        46, (("masked-sums",), ("scaffold",)), "conditional",
        "Control variates are a second vector of private numbers.",
        "they are a part of the same masked words, which doubles the bytes.",
        ("stages/words.py::Layout",),
        ("tests/stages/test_words.py::test_what_nobody_agreed_on_does_not_leave", *_BEHIND),
    ),
    Combination(
        47, (_SECURE, ("model-per-silo",)), "refuse",
        "A model made for one silo turns the sum into that silo's update.",
        "one model for the cohort, made personal inside the silo.",
        ("gather/base.py::ask", "secure/silo.py::Member"),
        (f"{_HERE}test_every_silo_of_a_cohort_is_sent_the_same_task", *_BOUND),
    ),
    Combination(
        48, (("masked-sums",), ("unsigned-keys",)), "refuse",
        "The coordinator could play all the neighbours of a silo.",
        "identity keys that silos know beforehand, and round keys signed by them.",
        ("secure/messages.py::Agreement", "secure/silo.py::Member"),
        (f"{_HERE}test_masks_need_a_roster_of_keys",
         "tests/secure/test_silo.py::test_an_invitation_to_another_agreement_or_by_another_is_refused"),
    ),
    Combination(
        49, (_SECURE, ("plaintext-fallback",)), "refuse",
        "Whoever can make secure sums fail then reads the updates.",
        "an abort, in which nothing is sent.",
        (*_FEDERATION, "stages/mask.py::Mask", "secure/backends.py::seal"),
        ("tests/secure/test_homomorphic.py::"
         "test_without_the_library_a_treaty_that_asks_for_it_is_refused_and_told_what_to_do",
         f"{_HERE}test_what_hides_and_who_gathers_blindly_come_together_or_not_at_all",
         f"{_HERE}test_without_masks_nothing_leaves"),
    ),
    Combination(
        50, (_SECURE, ("untrusted-model",)), "conditional",
        "A model made to leak speaks through the sum.",
        "model, task and cohort are bound to the masks; what a sum tells is limited by a guarantee ([privacy]) alone.",
        ("types.py::Task", "secure/silo.py::Member", "treaty/words.py::_SECRET"), _BOUND,
    ),
    Combination(
        51, (_SECURE, ("alignment",)), "conditional",
        "A silo's mean embedding tells what its text is about.",
        "it is one more part of the same sum: the coordinator learns the mean over all and the mean of their squared"
        " lengths, and each silo its own place beside it. A target's is a part that it alone fills: with noise of its"
        " own, or not at all.",
        ("algorithms/alignment.py::parts", "build.py::build", "treaty/rules.py::_a_target_that_no_sum_hides"),
        (*_METHODS, "tests/silo/test_alignment.py::test_every_part_that_is_sent_is_one_that_was_declared",
         "tests/stages/test_words.py::test_what_nobody_agreed_on_does_not_leave", *_BEHIND),
    ),
    Combination(
        52, (_SECURE, ("domain-attention",)), "conditional",
        "A weight that follows from a silo's text tells about it.",
        "silos send w · Δ and w as parts of one sum, and the quotient of the two is the mean; nobody sees a single w.",
        ("algorithms/alignment.py::direction", "attention.py::Attention", "silo/handler.py::Handler"),
        (*_BEHIND, "tests/test_methods_run.py::"
         "test_a_weight_has_no_name_beside_it_where_the_treaty_or_a_mask_hides_it",
         "tests/test_attention.py::test_shares_add_up_to_one_and_weights_stay_within_their_public_bound"),
    ),
    Combination(
        53, (("differential-privacy",), ("alignment", "domain-attention")), "conditional",
        "Embeddings and weights are made of the same private text as the updates.",
        "they follow from surveys with noise of their own, which the plan charges together with the steps; where whole"
        " silos are protected they stand inside the clip of the update.",
        ("privacy/survey.py::Survey", "silo/survey.py::survey", "methods.py::surveys"),
        ("tests/privacy/test_survey.py::test_a_round_with_a_survey_costs_its_steps_and_the_survey_and_every_other_its_steps",
         "tests/silo/test_survey.py::test_adding_or_removing_any_unit_moves_each_part_by_at_most_one",
         "tests/silo/test_alignment.py::test_private_silos_pull_by_what_they_released_and_weigh_by_it"),
    ),
    Combination(
        54, (("distributed-noise",), ("alignment", "scaffold", "synthetic-samples")), "conditional",
        "Shares of noise are whole in the sum of one step of the model, and in nothing else that a silo makes of its"
        " text.",
        "whole silos are protected, whose one clip and noise cover all parts; for units inside silos every step has"
        " noise of its own (placement = \"silo\").",
        ("treaty/rules.py::_noise_that_covers_the_method",), _METHODS,
    ),
    Combination(
        55, (("differential-privacy",), ("scaffold",)), "conditional",
        "A control variate is a second vector made of private text.",
        "it is the mean of gradients that private steps have released, noise included, and costs nothing more.",
        ("algorithms/scaffold.py::Scaffold",),
        ("tests/silo/test_scaffold.py::"
         "test_a_control_is_the_mean_of_the_noisy_gradients_that_its_silo_stepped_along",),
    ),
    Combination(
        56, (("differential-privacy",), ("text-store",)), "conditional",
        "A store answers with its text, word for word.",
        "the network is tuned against public text where units inside silos are protected, and the statement says that"
        " answers of a silo's own store, and figures measured with them, are not covered.",
        ("treaty/rules.py::_a_store_of_public_text", "treaty/words.py::not_covered"),
        (*_METHODS, "tests/test_treaty.py::test_what_a_method_reads_outside_its_guarantee_is_said"),
    ),
    Combination(
        57, (("differential-privacy",), ("synthetic-samples",)), "conditional",
        "Synthetic text can be the real one.",
        "it is made of gradients that private steps have released and of a public seed, for units inside silos.",
        ("algorithms/fedlap.py::FedLap", "treaty/rules.py::_noise_that_covers_the_method"), _METHODS,
    ),
    Combination(
        58, (_SECURE, ("synthetic-samples",)), "refuse",
        "The server needs every silo's texts one by one: in a sum each has a slot of its own, and a slot that one silo"
        " alone fills hides nothing.",
        "sums in the open, and noise for units inside silos, which covers what is sent.",
        ("treaty/rules.py::_nothing_that_the_matrix_refuses",), _METHODS,
    ),
)  # fmt: skip
