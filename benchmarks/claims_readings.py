"""The goals of the claims in plain words: what each means where it was met, where it was missed, and why."""

from claims_summary import MARGIN, PAPER, TIMES
from results_page import Reading

_SAME = f"Training on stored rollouts ends at most {MARGIN:g} below online OPD (table 1)"
_SETTLES = "The ratio to the reference policy settles near 1 (figure 3a)"


def claims_readings(fall: str, limit: str) -> list[Reading]:
    """Return the readings of `claims.json`.

    Args:
        fall: name of the setting in which Lightning fails.
        limit: how many times as much as its own training online OPD costs here: what a store saves at most, if training costs it the same.
    """
    return [
        Reading(
            "Online OPD improves on SFT (table 1)",
            r"^online OPD gains over SFT",
            "online OPD gains {measured} in accuracy over SFT",
            "online OPD gains nothing over SFT that could be told from chance ({measured})",
            told=".",
        ),
        Reading(
            _SAME,
            r"^(?P<arm>Lightning.*) minus online OPD",
            f"*{{arm}}* ends at most {MARGIN:g} below online OPD ({{measured}})",
            f"*{{arm}}* ends more than {MARGIN:g} below online OPD ({{measured}})",
            "Stored states are those of the SFT student, and the plain loss weighs their tokens as if the student had not moved; the ratio does not.",
            told=".",
            open=f"*{{arm}}* was not shown to end at most {MARGIN:g} below online OPD ({{measured}})",
        ),
        _dearer(
            f"Online OPD costs {TIMES:g} times as much (table 2)",
            r"(?P<what>equal steps) \(table 2\)$",
            f"A store saves sampling and scoring, never training.  If training costs it what it costs online, it saves at most {limit} here; "
            "rounds make that of online OPD dearer, so a store can pass this.  In the paper long responses of a large model are "
            f"decoded token by token, and Lightning's training is {PAPER.training:g} of the {PAPER.online:g} GPU-hours of online OPD.",
        ),
        _dearer(
            f"Online OPD costs {TIMES:g} times as much until both are as accurate (lopd's own goal: the paper has no such figure)",
            r"(?P<what>equal accuracy|half of the gain)$",
            told="ratio to ref, cost of the OPD stage at equal accuracy",
        ),
        Reading(
            "The teacher of SFT should be the teacher of OPD (table 4)",
            r"\(table 4\)",
            "with the teacher of SFT Lightning gains {measured} more than with another",
            "with the teacher of SFT Lightning gains no more than with another ({measured})",
            told=".",
        ),
        Reading(
            _SETTLES,
            r"moves less after step 20",
            "the mean ratio moves less after step 20 than before ({measured})",
            "the mean ratio moves {measured} more after step 20 than before",
            "It hardly moves before step 20 either, so there is nothing that could settle.",
        ),
        Reading(
            _SETTLES,
            r"of any step is within",
            "the mean ratio of a step is never further than {measured} from 1",
            "the mean ratio of a step goes {measured} away from 1",
        ),
        Reading(
            "Lightning gains after any length of SFT (figure 3c)",
            r"^Lightning gains over SFT at (?P<steps>\d+) SFT steps",
            "after {steps} steps of SFT Lightning gains {measured}",
            "after {steps} steps of SFT Lightning gains nothing ({measured})",
            "A student after little SFT makes errors that the teacher finds all but impossible, and these few tokens are most of the gradient.",
        ),
        Reading(
            "The gradient gap is within its bound (theorem 3.5)",
            r"^(?P<arm>.+) on (?P<setting>.+): largest gradient gap over its bound",
            "*{arm}* on *{setting}*: the gap is at most {measured} of its bound",
            "*{arm}* on *{setting}*: the gap is {measured} times its bound",
            told=fall,
        ),
        Reading(
            "TRL's trainer costs more",
            r"^TRL over (?P<arm>.+), cost at (?P<what>.+)$",
            "TRL costs {measured} times as much as *{arm}* at {what}",
            "TRL was not shown to cost more than *{arm}* at {what} ({measured} times as much)",
            "TRL's loss is the reverse KL over the whole vocabulary, which learns more from a step than one sampled token does; stored supports are "
            "in the part on estimators.",
            told="(ratio to ref|top-8, reverse KL), cost at equal accuracy",
        ),
        _no_fall(
            "variant",
            fall,
            "^Lightning(, ratio to ref)? does",
            "This teacher is all but certain and finds the errors of a young student impossible.  Without the ratio such a token goes on being "
            "pushed down after the student has dropped it; a smaller rate, a smaller clip or new rollouts every 20 steps slow that and do not "
            "turn it.",
        ),
    ]


def _dearer(claim: str, at: str, reason: str = "", told: str = "") -> Reading:
    """Return the reading of goals on how many times as much online OPD costs."""
    return Reading(
        claim,
        rf"^online OPD over (?P<arm>.+), cost of the OPD stage at {at}",
        "online OPD costs {measured} times as much as *{arm}* at {what}",
        "online OPD costs only {measured} times as much as *{arm}* at {what}",
        reason,
        told=told,
        open="online OPD was not shown to cost {bound} times as much as *{arm}* at {what} ({measured} times)",
    )


def _no_fall(what: str, fall: str, told: str, reason: str = "") -> Reading:
    """Return the reading of goals on the setting in which Lightning fails."""
    where = "below SFT where the teacher is all but certain ({measured})"
    return Reading(
        f"No {what} falls more than {MARGIN:g} below SFT on {fall}, where Lightning may fail",
        r"^(?P<arm>.+) does not fall more than .+ below SFT on (?P<setting>.+)$",
        f"*{{arm}}* ends at most {MARGIN:g} {where}",
        f"*{{arm}}* falls more than {MARGIN:g} {where}",
        reason,
        told=told,
        open=f"*{{arm}}* was not shown to end at most {MARGIN:g} {where}",
    )


def estimators_readings(best: str, fall: str, rate: str) -> list[Reading]:
    """Return the readings of `claims_estimators.json`.

    Args:
        best: name of the arm that the goals are set for.
        fall: name of the setting in which Lightning fails.
        rate: what names of arms at the higher rate end with.
    """
    either = f"(?P<rate>(?:{rate})?)"
    return [
        Reading(
            f"The stored arm (*{best}*) ends at most {MARGIN:g} below live teachers",
            rf"^.+?{either}, minus (?P<peer>.+?)(?:{rate})?: accuracy$",
            f"the stored arm ends at most {MARGIN:g} below *{{peer}}* ({{measured}}{{rate}})",
            f"the stored arm ends more than {MARGIN:g} below *{{peer}}* ({{measured}}{{rate}})",
            told=".",
            open=f"the stored arm was not shown to end at most {MARGIN:g} below *{{peer}}* ({{measured}}{{rate}})",
        ),
        Reading(
            "The stored arm costs a fraction of them",
            rf"^.+?{either}, as a share of (?P<peer>.+?)(?:{rate})?: cost at (?P<what>.+)$",
            "it costs {measured} of *{peer}* at {what}{rate}",
            "it costs {measured} of *{peer}* at {what}{rate}, more than was wanted",
            "A store saves nothing of training, which is most of what is left.",
            told=".",
            open="it was not shown to cost at most {bound} of *{peer}* at {what}{rate} ({measured})",
        ),
        _no_fall("arm", fall, "^8 candidates, residual does"),
    ]
