"""Seeds of what is reported on the testbed.

Nothing was chosen on any of them: rates, lengths, limits of the guards and arms of the goals come from seeds below 300.  Experiments do not
share them, except `claims.py` and `claims_estimators.py`, whose models are the same.
"""

CLAIMS = range(300, 305)
LONG = range(320, 325)
PAIRS = range(340, 343)
GUARDS = range(360, 365)
