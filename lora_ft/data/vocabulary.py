"""The words of the quickstart's sentences (`meetings`): many to train on, and others that are held out.

A model has to learn to copy them, not to know them: of fewer words it puts those that it was trained on in the place of
others.
"""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "held_out"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TOPICS: dict[Split, tuple[str, ...]] = {
    "train": _words(
        """
        access account acoustics airport algebra alumni ambulance analytics anatomy anniversary apartment
        apprentice aquarium architecture archive art asset astronomy audience autumn aviation backup bakery
        balcony ballet band bank barrel basement battery beach bicycle biology birthday blood blueprint board
        boat bonus book border botany branch brand brewery bridge broadcast browser budget building bus cable
        calendar camera campus canal canteen capacity capital carbon cargo carpet castle catalogue catering cave
        ceiling cello census ceramics channel chapel charity chart chemistry chess chocolate choir church cinema
        circuit circus citizen climate clinic clock cloud coaching coal coast coffee colour comedy community
        company compass complaint computer concert concrete conference contract copper copyright corridor
        costume cotton council county courier court crane credit culture currency curriculum customer dairy
        dance data database deadline debt defence delivery democracy dental desert design desk diary diploma
        discount display district dragon drainage drama drone drought ecology economy editor education election
        elevator embassy emergency employee energy engine engineering entrance equipment estate ethics evidence
        exam excavation exhibition export fabric facility factory family farm fashion feedback ferry festival
        fiction film filter finance fire fishery fitness fleet flight flood floor flower folklore food footpath
        forecast forest forestry fossil foundation fountain frontier fuel fund fur furniture future gallery game
        garage gas genome geography geology gift glacier glass gold grammar grant graphics guitar gym habitat
        handbook harbour hardware harvest health heating helicopter heritage hiring hockey holiday honey horse
        hospital hotel housing hydrogen ice identity image import income industry infant insect insurance
        interface internet inventory invoice irrigation island jazz jewelry journal judge jungle junior jury
        justice keyboard kidney knowledge laboratory ladder lake lamp landing language laser laundry law
        leadership leather legacy leisure lens library licence lighting linen literacy loan lobby locker loyalty
        luggage lunar machine magazine mail maintenance malaria manual map marathon marble marina market
        marketing maths measurement meat mechanics medal media memory mentoring merger metal meteor microscope
        migration milk mineral mining mobile molecule money monitor mortgage mosaic motor mountain music mystery
        nature navy needle neighbour neuron newsletter newspaper night noise novel nuclear number nursing
        nutrition oak ocean office oil onboarding opera optics orchard orchestra orchid organ outreach oven
        oxygen ozone packaging painting palace paper parade parcel park parking parliament partner passenger
        passport pasta pasture patent pavement peace pearl pension performance permit pharmacy philosophy
        photography physics piano pilot pipeline planet plastic platform playground plumbing poetry police
        policy pollution pond population port portfolio postage pottery power privacy prize procurement product
        profit program project property protein province publicity pump puppet pyramid quality quarry queue quiz
        radar radiation radio railway rainfall ranking recipe record recovery recruiting recycling referee
        reform refugee region release religion repair reptile rescue research reservoir restaurant retail
        retirement revenue rice risk river road roadmap robot robotics rocket roof rose routine rowing royalty
        rubber rugby safety sailing salary sales salmon salt sample sand satellite satire sauce savings scanner
        scenery schedule scholarship school science sculpture season security sensor server settlement shadow
        share shelter sheriff ship shop signal silk silver sketch skiing sleep smoke snow soccer socket software
        soil solar soldier solution song soup spectrum speech spice spring stadium staff stage startup
        statistics statue steam steel stock stone storage storm strategy studio subscription suburb subway sugar
        summer supply support surface surgeon surgery survey sustainability swimming tablet tariff tax taxi tea
        team technology telephone telescope temple tenant tennis terminal territory text textile theatre therapy
        thermal ticket timber timetable tobacco tooth tourism tower town toy track trade traffic training tram
        transport travel treasury tree trial tribute tropical trust tunnel turbine tutoring uniform union
        universe university uranium vacation vaccine valley value vegetable vehicle velocity vendor venue
        veteran video village vineyard violin virus visa vision vitamin volcano voltage volunteer voter voyage
        wage wallet warehouse waste watch water wave weather website wedding welfare whale wheat wheel wildlife
        window wine winter wool writing yearbook yoga youth zoning zoo
        """
    ),
    "held_out": _words(
        "pricing network payroll podcast museum logistics compliance fundraising kitchen translation thesis garden"
    ),
}
"""What a meeting is about, the first word of its title."""

KINDS: dict[Split, tuple[str, ...]] = {
    "train": _words(
        """
        agenda analysis appointment assembly assessment audit brainstorm breakfast briefing call campaign
        celebration ceremony chat check-in class competition consultation contest course debate debrief demo
        discussion drill evaluation event examination exchange excursion experiment forum gathering handover
        hearing hike inspection interview introduction kickoff launch lecture lesson lunch luncheon meeting
        negotiation offsite orientation outing panel picnic pitch planning presentation preview proposal
        questionnaire raffle recap reception recital refresher report retrospective reunion review round
        roundtable screening service session show showcase signing simulation sprint standup study summit
        symposium sync talk test tutorial update visit vote webinar workshop wrap-up
        """
    ),
    "held_out": _words("upgrade rehearsal tour dinner committee seminar walkthrough party"),
}
"""What kind of a meeting it is, the second word of its title."""

NAMES: dict[Split, tuple[str, ...]] = {
    "train": _words(
        """
        Aaron Abigail Adam Adele Agnes Aisha Albert Alice Alina Amanda Ambrose Amelia Andrea Andrew Angus Anita
        Anna Anton Archie Ariana Arjun Arnold Astrid Audrey Axel Barbara Basil Beatrice Ben Benedict
        Bernard Bertha Beth Bianca Blake Bonnie Boris Brenda Bridget Bruno Bryan Caleb Camille Carla Carmen
        Caspar Cassandra Catherine Cedric Celia Chandra Charles Chiara Chloe Christian Claire Clara Claudia
        Clive Colin Connor Conrad Cora Cynthia Cyrus Daniel Daphne Darius David Deborah Delia Denise Dennis
        Derek Diana Diego Dmitri Dominic Donald Dora Doris Dylan Edgar Edith Edmund Edward Eleanor Elena Eli
        Elise Ella Emil Emma Enzo Eric Erik Ernest Estelle Esther Eugene Eva Evelyn Fabian Faith Farid Felicity
        Felix Fergus Finn Fiona Flora Florian Francis Frank Freya Gabriel Gail Garth Gemma Gerald Gideon Gilbert
        Gina Giulia Gloria Gordon Grace Graham Gregory Greta Gustav Gwen Hamza Harold Harriet Harvey Hassan
        Hector Heidi Helen Henry Herman Hilda Holly Howard Hubert Hugo Ian Ibrahim Ida Igor Imogen Ines Ingrid
        Irene Iris Isaac Isabel Ismail Ivy Jack Jacob James Jane Janet Jasmine Jason Jasper Jean Jeffrey Jenny
        Jerome Jessica Joanna Joel Johan Jonas Jorge Joseph Josephine Joyce Juan Judith Julian Juliet Justin
        Kamal Karen Karim Karl Kate Keith Kenneth Kevin Khalid Kim Kira Klaus Lara Lars Laura Laurence Leah
        Leila Lena Leonard Leslie Lewis Liam Liliana Linus Lisa Lorenzo Louis Louise Lucas Lucia Luke Luther
        Lydia Mabel Madeleine Magnus Malcolm Marcel Marcus Margaret Maria Mario Martin Marvin Mary Matilda
        Matthew Maurice Max Maya Megan Melissa Mercy Michael Miguel Milan Mira Miriam Mohammed Monica Morgan
        Muriel Naomi Nathan Neil Nelson Niamh Nicholas Nicole Nils Nina Noah Noel Nora Norman Octavia Odette
        Olga Omar Ophelia Orlando Oscar Oswald Otto Owen Pablo Pamela Patricia Patrick Paul Pauline Pearl
        Penelope Percy Peter Petra Philip Phoebe Priya Quentin Quincy Rachel Rafael Ralph Ramona Raymond Rebecca
        Regina Reza Richard Rita Roland Roman Ronald Rosa Rosalind Rowan Roxana Rufus Rupert Ruth Ryan Sabine
        Sally Salma Samir Samuel Sandra Sarah Saul Sean Sebastian Selma Sergio Shirley Sidney Sigrid Silas
        Silvia Simon Sonia Spencer Stefan Stella Stephanie Susan Sven Sylvester Tabitha Tamara Tanja Tara Tariq
        Terence Teresa Tessa Thelma Thomas Tilda Timothy Tobias Tom Tony Tracy Trevor Ulla Ulrich Uma Ursula
        Valentin Valerie Vanessa Vera Vernon Veronica Victor Vikram Vincent Violet Vivian Wallace Walter Wanda
        Warren Wei Wendy Wilfred Willa William Wilma Winston Xavier Xenia Yara Yasmin Yolanda Yuki Yusra Yusuf
        Yvonne Zachary Zainab Zara Zelda Zoe Zuri
        """
    ),
    "held_out": _words(
        """
        Amir Bella Carlos Daria Ethan Fatima George Hannah Ivan Julia Kenji Leo Marta Nadia Oliver Paula Robert Sofia
        Theo Viola
        """
    ),
}
"""Who attends it."""
