"""The goals of the claims in plain words: what each means where it was met, where it was missed, and why."""

from claims_summary import MARGIN, PAPER, TIMES
from results_page import Reading

_SAME = f"Training on stored rollouts ends at most {MARGIN:g} below online OPD (table 1)"
_SETTLES = "The ratio to the reference policy settles near 1 (figure 3a)"


def claims_readings(claim: str, fall: str, *, limit: str, before: str, online: str, elsewhere: str) -> list[Reading]:
    """Return the readings of `claims.json`.

    Args:
        claim: name of the setting in the paper's regime.
        fall: name of the setting in which Lightning fails.
        limit: how many times as much as its own training online OPD costs here: what a store saves at most, if training costs it the same.
        before: how far from 1 the mean ratio is at step 20.
        online: what online OPD changes where Lightning gains nothing for want of SFT.
        elsewhere: how far from 1 the mean ratio is in the other settings.
    """
    return [
        Reading(
            "Online OPD improves on SFT (table 1)",
            r"^online OPD gains over SFT",
            "online OPD gains {measured} in accuracy over SFT",
            "online OPD falls below SFT ({measured})",
            told=".",
            open="online OPD gains nothing over SFT that could be told from chance ({measured})",
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
            "rounds make that of online OPD dearer, so a store can pass this.  In the paper long responses of a large model are decoded token "
            f"by token: online OPD takes {PAPER.online:g} GPU-hours, and all of Lightning {PAPER.total:g}, of which training is {PAPER.training:g}.",
        ),
        _dearer(
            f"Online OPD costs {TIMES:g} times as much until both are as accurate (lopd's own goal: the paper has no such figure)",
            r"(?P<what>equal accuracy|half of the gain)$",
            told="ratio to ref, cost of the OPD stage at equal accuracy",
        ),
        Reading(
            "The teacher of SFT should be the teacher of OPD (table 4)",
            r"\(table 4\)",
            "another teacher than that of SFT costs Lightning {measured} more than it costs online OPD",
            "another teacher than that of SFT costs Lightning less than online OPD ({measured})",
            told=".",
            open="another teacher than that of SFT was not shown to cost Lightning more than online OPD ({measured})",
        ),
        Reading(
            _SETTLES,
            r"moves less after step 20",
            "the mean ratio moves less after step 20 than before ({measured})",
            "the mean ratio moves {measured} more after step 20 than before",
            f"Before step 20 it moves by {before}.",
            open="the mean ratio was not shown to move less after step 20 than before ({measured})",
        ),
        Reading(
            _SETTLES,
            r"spread of the ratio at the last step",
            "the spread of the ratio over tokens is {measured} at the end",
            "the spread of the ratio over tokens is as much as {measured} at the end",
            told=".",
            open="the spread of the ratio over tokens was not shown to be at most {bound} at the end ({measured})",
        ),
        Reading(
            f"Stored tokens are not overfitted on {claim}: on new ones the mean ratio is 1 for every student",
            r"of any step is within",
            f"the mean ratio of the step at which it is farthest from 1 is {{measured}} away ({elsewhere})",
            f"the mean ratio of the step at which it is farthest from 1 is as much as {{measured}} away ({elsewhere})",
            open=f"the mean ratio of a step was not shown to be within {{bound}} of 1 (at the farthest {{measured}} away; {elsewhere})",
        ),
        Reading(
            "Lightning gains after any length of SFT (figure 3c)",
            r"^Lightning gains over SFT at (?P<steps>\d+) SFT steps",
            "after {steps} steps of SFT Lightning gains {measured}",
            "after {steps} steps of SFT Lightning makes the student worse ({measured})",
            "A student after little SFT makes errors that the teacher finds all but impossible, and these few tokens are most of the gradient.  "
            f"The loss is not all of it: online OPD, with the same loss on new rollouts, changes accuracy by {online} from these starts.",
            open="after {steps} steps of SFT Lightning was not shown to gain ({measured})",
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
            "TRL costs less than *{arm}* at {what} ({measured} times as much)",
            "TRL's loss is the reverse KL over the whole vocabulary, which learns more from a step than one sampled token does; stored supports are "
            "in the part on estimators.",
            told="(ratio to ref|top-8, reverse KL), cost at equal accuracy|cost at half of the gain",
            open="TRL was not shown to cost more than *{arm}* at {what} ({measured} times as much)",
        ),
        Reading(
            f"Stored runs end at most {MARGIN:g} below TRL's trainer",
            r"^(?P<arm>.+), minus TRL: accuracy$",
            f"*{{arm}}* ends at most {MARGIN:g} below TRL ({{measured}})",
            f"*{{arm}}* ends more than {MARGIN:g} below TRL ({{measured}})",
            "One stored number a token shows little of where mass should go; TRL's teacher is asked for the whole vocabulary.",
            told="ratio to ref|top-8, reverse KL",
            open=f"*{{arm}}* was not shown to end at most {MARGIN:g} below TRL ({{measured}})",
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
