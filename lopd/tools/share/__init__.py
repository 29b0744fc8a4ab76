"""Students and stores on a model hub, each with its card: what is pushed, where to, and who may see it is named in the call."""

from lopd.records.optional import needing as _needing

with _needing("transformers", __name__, "hub"):
    from lopd.tools.share.cards import About as About
    from lopd.tools.share.cards import dataset_card as dataset_card
    from lopd.tools.share.cards import model_card as model_card
    from lopd.tools.share.sharing import pull_store as pull_store
    from lopd.tools.share.sharing import push_store as push_store
    from lopd.tools.share.sharing import push_student as push_student
