"""Chapter 2, a token's path: three exercises. `pytest docs/book -k chapter2` says how far you are."""


def total(c):
    """Parameters of a model without MTP, selection biases included. c a Config with q_lora_rank set -> int.

    Embedding and head are two matrices; there is a norm before attention, before the feed-forward, behind each latent, and one
    at the end. c.is_moe(layer) tells which layers have experts.
    """
    raise NotImplementedError("exercise 2.1")


def active(c):
    """Of total(c) those that one token meets: of the routed experts only num_experts_per_tok a layer. -> int"""
    raise NotImplementedError("exercise 2.2")


def real_shape(letters, c, batch, length):
    """The shape that letters mean. "B S H Dn+Dr" -> (batch, length, 128, 192) for the released configuration.

    Letters: B S T (= length) D V H Dn Dr Dv C Q E G K; a term is a letter, a number, a sum, or a letter halved ("Dr/2").
    """
    raise NotImplementedError("exercise 2.3")
