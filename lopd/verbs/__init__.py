"""What a program does with the nouns: collect, score, batch, train, evaluate, refresh, keep.  Verbs know protocols, never implementations.

The functions are imported from `lopd`; here is what they give.
"""

from lopd.verbs.collect import CollectionReport as CollectionReport
from lopd.verbs.evaluate import Evaluation as Evaluation
from lopd.verbs.filling import ScoringReport as ScoringReport
from lopd.verbs.loader import StepStream as StepStream
from lopd.verbs.preflight import Preflight as Preflight
from lopd.verbs.refresh import Round as Round
