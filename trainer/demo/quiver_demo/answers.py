"""The tasks of the support desk: what each team's adapter has to answer to a ticket."""

from collections.abc import Callable

from quiver_demo.tickets import Ticket

TEAMS: dict[str, str] = {
    "charged_twice": "Billing",
    "wrong_total": "Billing",
    "parcel_late": "Shipping",
    "address_change": "Shipping",
    "send_back": "Returns",
    "wrong_item": "Returns",
    "will_not_pair": "Technical",
    "update_stuck": "Technical",
    "locked_out": "Account",
    "change_contact": "Account",
    "bulk_order": "Sales",
    "other_version": "Sales",
    "stopped_working": "Warranty",
    "spare_part": "Warranty",
}

# 1: the customer is stuck or out of money. 2: something is wrong. 3: it can wait.
URGENCY: dict[str, int] = {
    "charged_twice": 1,
    "parcel_late": 1,
    "locked_out": 1,
    "stopped_working": 1,
    "wrong_total": 2,
    "address_change": 2,
    "wrong_item": 2,
    "will_not_pair": 2,
    "update_stuck": 2,
    "send_back": 3,
    "change_contact": 3,
    "bulk_order": 3,
    "other_version": 3,
    "spare_part": 3,
}

OPENINGS: dict[str, str] = {
    "positive": "thank you for your kind words.",
    "neutral": "thank you for your message.",
    "negative": "we are very sorry for the trouble.",
}

REMEDIES: dict[str, str] = {
    "charged_twice": "We will refund the second payment for your {product} within three days.",
    "wrong_total": "We will correct the invoice for your {product} and refund the difference.",
    "parcel_late": "We will trace the parcel with your {product} and write again tomorrow.",
    "address_change": "We will send your {product} to the new address you gave us.",
    "send_back": "Your free return label for the {product} comes by mail today.",
    "wrong_item": "We will send the right {product} and collect the wrong one.",
    "will_not_pair": "Please restart your {product} and the app, then pair them once more.",
    "update_stuck": "Please hold the button of your {product} until the update starts again.",
    "locked_out": "We have unlocked the account with your {product}, so please sign in again.",
    "change_contact": "We have updated the account with your {product} as you asked.",
    "bulk_order": "Our sales team will send you an offer like your {product} today.",
    "other_version": "Our sales team will send you all versions of the {product} today.",
    "stopped_working": "We will replace your {product} free of charge under the warranty.",
    "spare_part": "We will send a free spare part for your {product} tomorrow.",
}

CLOSINGS: dict[str, str] = {
    "positive": "You made our day. Warm regards, Larkfield",
    "neutral": "Kind regards, Larkfield",
    "negative": "Please accept a voucher as well. Kind regards, Larkfield",
}


def routing(ticket: Ticket) -> str:
    """The team that has to deal with the ticket; the kind of issue decides."""
    return TEAMS[ticket.kind]


def extract(ticket: Ticket) -> str:
    """Order number and product, as a line that programs can read.

    Not as JSON: behind a quotation mark a name consists of other tokens than in a sentence, and a base of two million
    parameters copies tokens but cannot spell.
    """
    return f"order: {ticket.order}, product: {ticket.product}"


def sentiment(ticket: Ticket) -> str:
    """positive, neutral or negative: how the customer sounds, whatever the issue is."""
    return ticket.tone


def reply(ticket: Ticket) -> str:
    """The reply in the house style: opening and closing follow the tone, the remedy follows the kind of issue."""
    remedy = REMEDIES[ticket.kind].format(product=ticket.product)
    return f"Dear {ticket.first_name}, {OPENINGS[ticket.tone]} {remedy} {CLOSINGS[ticket.tone]}"


def priority(ticket: Ticket) -> str:
    """P1 (today) to P3 (this week): the urgency of the issue, a step up for a cross customer, down for a happy one."""
    shift = {"positive": 1, "neutral": 0, "negative": -1}[ticket.tone]
    return f"P{min(max(URGENCY[ticket.kind] + shift, 1), 3)}"


TASKS: dict[str, Callable[[Ticket], str]] = {
    "routing": routing,
    "extract": extract,
    "sentiment": sentiment,
    "reply": reply,
    "priority": priority,
}
