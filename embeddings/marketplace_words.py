"""Words of the simulated marketplace: its taxonomy, attributes, brands, and the words only its shoppers use.

A product type is a leaf of `department > family > leaf`. Types of one family are each other's substitutes; a type
names the leaf that complements it. `slang` and `lines` are invented: no pretrained encoder knows that "zoomps"
are running shoes, and slang never occurs in the catalogue, so only training on this shop's judgements teaches it.
"""

# ruff: noqa: E501  one product type per line reads as the table that it is

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """A property that titles state and queries constrain; `phrase` words a value, before or after the noun."""

    name: str
    values: tuple[str, ...]
    phrase: str = "{}"
    after_noun: bool = False


@dataclass(frozen=True)
class ProductType:
    """One leaf of the taxonomy; prices are the usual range in US dollars."""

    department: str
    family: str
    leaf: str
    nouns: tuple[str, ...]
    synonyms: tuple[str, ...]
    slang: tuple[str, ...]
    lines: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    complement: str
    price: tuple[float, float]


COLOR = Attribute("color", ("red", "blue", "black", "white", "green", "grey", "pink", "yellow"))
METAL = Attribute("material", ("stainless steel", "cast iron", "aluminium", "copper"))
GENDER = Attribute("gender", ("women", "men", "kids"), "{}'s")
SHOE = Attribute("size", ("6", "7", "8", "9", "10", "11"), "size {}", after_noun=True)
SOCK = Attribute("size", ("small", "medium", "large"))
FABRIC = Attribute("material", ("cotton", "linen", "microfiber", "satin"))
BED = Attribute("size", ("twin", "full", "queen", "king"))
LENGTH = Attribute("length", ("25 ft", "50 ft", "75 ft", "100 ft"))
VOLT = Attribute("voltage", ("12V", "18V", "20V"))
LITRES = Attribute("capacity", ("20L", "30L", "45L"))
CUPS = Attribute("capacity", ("4 cup", "8 cup", "12 cup"))
PAN = Attribute("size", ("8 inch", "10 inch", "12 inch"))
WATTS = Attribute("power", ("40W", "60W", "100W"))
STORAGE = Attribute("capacity", ("64GB", "128GB", "256GB"))
THICK = Attribute("thickness", ("4mm", "6mm", "10mm"))
LINK = Attribute("connection", ("wireless", "wired", "usb-c"))
FLAVOR = Attribute("flavor", ("chicken", "beef", "salmon", "lamb"))
WEIGHT = Attribute("weight", ("5 lb", "15 lb", "30 lb"), after_noun=True)
PACK = Attribute("pack", ("pack of 2", "pack of 6", "pack of 12"), after_noun=True)
MODEL = Attribute("fits", ("Orbit 5", "Orbit 6", "Lumo X", "Lumo Z"), "for {}", after_noun=True)
GRIND = Attribute("roast", ("light roast", "medium roast", "dark roast"))

SPORT, TECH, KITCHEN = "Sports & Outdoors", "Electronics", "Kitchen & Dining"
HOME, GARDEN, PETS = "Home & Living", "Garden & Tools", "Pet Supplies"

# fmt: off
TYPES: tuple[ProductType, ...] = (
    ProductType(SPORT, "Running Footwear", "Running Shoes", ("running shoes", "road running shoes"), ("trainers", "sneakers", "jogging shoes"), ("zoomps", "dashers"), ("Veloria", "Pacewing"), (COLOR, SHOE, GENDER), "Running Socks", (35, 170)),
    ProductType(SPORT, "Running Footwear", "Trail Running Shoes", ("trail running shoes", "trail shoes"), ("off road runners", "mountain running shoes"), ("mudskips",), ("Cragmoor", "Ridgelo"), (COLOR, SHOE, GENDER), "Running Socks", (50, 190)),
    ProductType(SPORT, "Running Accessories", "Running Socks", ("running socks", "athletic socks"), ("jogging socks", "sport socks"), ("toehugs",), ("Sweftra",), (COLOR, SOCK, PACK), "Running Shoes", (6, 30)),
    ProductType(SPORT, "Running Accessories", "Shoe Insoles", ("shoe insoles", "gel insoles"), ("footbeds", "inner soles"), ("squidgers",), ("Archelle",), (SHOE, GENDER), "Running Shoes", (8, 45)),
    ProductType(SPORT, "Mats", "Yoga Mats", ("yoga mat", "non-slip yoga mat"), ("asana mat", "sticky mat"), ("stretchpad",), ("Lotura", "Padmaya"), (COLOR, THICK), "Yoga Blocks", (12, 90)),
    ProductType(SPORT, "Mats", "Exercise Mats", ("exercise mat", "workout mat"), ("gym mat", "pilates mat"), ("flopper",), ("Corebase",), (COLOR, THICK), "Yoga Blocks", (15, 80)),
    ProductType(SPORT, "Yoga Props", "Yoga Blocks", ("yoga block", "foam yoga brick"), ("yoga brick", "stretching block"), ("bendbricks",), ("Stillo",), (COLOR, PACK), "Yoga Mats", (8, 35)),
    ProductType(SPORT, "Backpacks", "Hiking Backpacks", ("hiking backpack", "trekking pack"), ("rucksack", "camping bag"), ("humpsack",), ("Altivo", "Farsummit"), (COLOR, LITRES), "Hydration Bladders", (40, 220)),
    ProductType(SPORT, "Backpacks", "School Backpacks", ("school backpack", "student backpack"), ("book bag", "schoolbag"), ("lugmate",), ("Chalkie",), (COLOR, LITRES), "Hydration Bladders", (18, 80)),
    ProductType(SPORT, "Hydration", "Hydration Bladders", ("hydration bladder", "water reservoir"), ("water bag with tube", "drinking pouch"), ("sipsack",), ("Brookline",), (COLOR, PACK), "Hiking Backpacks", (12, 45)),
    ProductType(TECH, "Phones", "Smartphones", ("smartphone", "unlocked smartphone"), ("mobile phone", "cell phone"), ("pocketslab",), ("Orbit", "Lumo"), (COLOR, STORAGE), "Phone Cases", (120, 1100)),
    ProductType(TECH, "Phone Protection", "Phone Cases", ("phone case", "protective phone case"), ("mobile cover", "phone shell"), ("bumpjacket",), ("Shellby", "Guardique"), (COLOR, MODEL), "Smartphones", (8, 60)),
    ProductType(TECH, "Phone Protection", "Wallet Cases", ("wallet phone case", "flip case with card holder"), ("folio case", "card case for phone"), ("cashflap",), ("Foldeo",), (COLOR, MODEL), "Smartphones", (12, 70)),
    ProductType(TECH, "Audio", "Headphones", ("over-ear headphones", "noise cancelling headphones"), ("headset", "ear defenders with music"), ("noggincans", "glimbos"), ("Sonavere", "Basswell"), (COLOR, LINK), "Headphone Stands", (25, 400)),
    ProductType(TECH, "Audio", "Earbuds", ("earbuds", "in-ear headphones"), ("earphones", "ear pods"), ("lugbeans",), ("Pebblo",), (COLOR, LINK), "Headphone Stands", (15, 250)),
    ProductType(TECH, "Audio Accessories", "Headphone Stands", ("headphone stand", "headphone holder"), ("headset hanger", "headphone rack"), ("canperch",), ("Restly",), (COLOR, METAL), "Headphones", (12, 60)),
    ProductType(TECH, "Charging", "Phone Chargers", ("phone charger", "fast charger"), ("charging plug", "power adapter"), ("juicer brick",), ("Zapello",), (COLOR, LINK), "Smartphones", (9, 60)),
    ProductType(KITCHEN, "Coffee Machines", "Coffee Makers", ("coffee maker", "drip coffee maker"), ("coffee machine", "filter coffee brewer"), ("brewbot", "wakepot"), ("Mornello", "Dripwell"), (COLOR, CUPS), "Coffee Filters", (25, 220)),
    ProductType(KITCHEN, "Coffee Machines", "Espresso Machines", ("espresso machine", "espresso maker"), ("cappuccino machine", "barista machine"), ("shotpuller",), ("Cremora", "Baristelle"), (COLOR, METAL), "Coffee Beans", (90, 800)),
    ProductType(KITCHEN, "Coffee Supplies", "Coffee Filters", ("coffee filters", "paper coffee filters"), ("filter papers", "drip papers"), ("soggies",), ("Papyra",), (CUPS, PACK), "Coffee Makers", (4, 18)),
    ProductType(KITCHEN, "Coffee Supplies", "Coffee Beans", ("coffee beans", "whole bean coffee"), ("arabica beans", "roasted coffee"), ("wakeseeds",), ("Montefina",), (GRIND, WEIGHT), "Espresso Machines", (9, 70)),
    ProductType(KITCHEN, "Cookware", "Frying Pans", ("frying pan", "nonstick frying pan"), ("skillet", "omelette pan"), ("sizzledisk",), ("Fryelle", "Hearthstone"), (METAL, PAN, COLOR), "Spatulas", (14, 120)),
    ProductType(KITCHEN, "Cookware", "Woks", ("wok", "stir fry pan"), ("chinese pan", "carbon wok"), ("tossbowl",), ("Wokiri",), (METAL, PAN), "Spatulas", (20, 130)),
    ProductType(KITCHEN, "Kitchen Utensils", "Spatulas", ("spatula", "silicone spatula turner"), ("pancake flipper", "egg turner"), ("flipstick",), ("Scoopa",), (COLOR, PACK), "Frying Pans", (5, 25)),
    ProductType(HOME, "Lamps", "Desk Lamps", ("desk lamp", "led desk lamp"), ("table light", "reading lamp", "study lamp"), ("glowneck",), ("Luminelle", "Archwick"), (COLOR, WATTS), "Light Bulbs", (15, 140)),
    ProductType(HOME, "Lamps", "Floor Lamps", ("floor lamp", "standing lamp"), ("corner light", "tall lamp"), ("tallglow",), ("Uplumo",), (COLOR, WATTS), "Light Bulbs", (30, 250)),
    ProductType(HOME, "Light Sources", "Light Bulbs", ("light bulb", "led bulb"), ("lamp globe", "replacement lamp"), ("glowpips",), ("Brightling",), (WATTS, PACK), "Desk Lamps", (4, 40)),
    ProductType(HOME, "Bedding", "Bed Sheets", ("bed sheets", "sheet set"), ("bed linen", "fitted sheets"), ("snoozewraps",), ("Dormira", "Silkhaven"), (COLOR, BED, FABRIC), "Bed Pillows", (20, 180)),
    ProductType(HOME, "Bedding", "Duvet Covers", ("duvet cover", "duvet cover set"), ("quilt cover", "comforter cover"), ("puffsleeve",), ("Nuvola",), (COLOR, BED, FABRIC), "Bed Pillows", (25, 200)),
    ProductType(HOME, "Pillows", "Bed Pillows", ("bed pillow", "sleeping pillow"), ("head cushion", "memory foam cushion"), ("snorecloud",), ("Cirrelle",), (BED, PACK), "Bed Sheets", (12, 90)),
    ProductType(GARDEN, "Hoses", "Garden Hoses", ("garden hose", "expandable garden hose"), ("water pipe for yard", "hosepipe"), ("squirtsnake",), ("Hydraflow", "Greenrun"), (COLOR, LENGTH), "Hose Nozzles", (18, 110)),
    ProductType(GARDEN, "Hoses", "Soaker Hoses", ("soaker hose", "drip hose"), ("seep hose", "irrigation hose"), ("weepsnake",), ("Dewline",), (COLOR, LENGTH), "Hose Nozzles", (15, 60)),
    ProductType(GARDEN, "Watering", "Hose Nozzles", ("hose nozzle", "spray nozzle"), ("watering gun", "hose sprayer"), ("spritzpistol",), ("Mistral",), (COLOR, METAL), "Garden Hoses", (7, 40)),
    ProductType(GARDEN, "Power Tools", "Power Drills", ("power drill", "cordless drill driver"), ("electric drill", "battery drill"), ("whirrgun",), ("Torquenor", "Boremax"), (VOLT, COLOR), "Drill Bits", (35, 260)),
    ProductType(GARDEN, "Power Tools", "Impact Drivers", ("impact driver", "cordless impact driver"), ("impact gun", "power screwdriver"), ("ruggadug",), ("Hammerel",), (VOLT, COLOR), "Drill Bits", (45, 280)),
    ProductType(GARDEN, "Tool Accessories", "Drill Bits", ("drill bit set", "twist drill bits"), ("boring bits", "hole drills"), ("twistynails",), ("Spiralon",), (METAL, PACK), "Power Drills", (8, 70)),
    ProductType(PETS, "Dog Food", "Dry Dog Food", ("dry dog food", "dog kibble"), ("puppy biscuits", "food for dogs"), ("crunchbark",), ("Waggoro", "Houndfare"), (FLAVOR, WEIGHT), "Dog Bowls", (12, 90)),
    ProductType(PETS, "Dog Food", "Wet Dog Food", ("wet dog food", "canned dog food"), ("dog meat tins", "soft dog food"), ("slopchow",), ("Gravello",), (FLAVOR, PACK), "Dog Bowls", (10, 60)),
    ProductType(PETS, "Feeding", "Dog Bowls", ("dog bowl", "pet feeding bowl"), ("puppy dish", "dog dish"), ("gulpring",), ("Feedora",), (COLOR, METAL), "Dry Dog Food", (7, 40)),
    ProductType(PETS, "Cat Care", "Cat Litter", ("cat litter", "clumping cat litter"), ("kitty sand", "litter granules"), ("pawgravel",), ("Clumpette",), (WEIGHT, PACK), "Litter Boxes", (9, 45)),
    ProductType(PETS, "Cat Toilets", "Litter Boxes", ("litter box", "covered litter box"), ("cat toilet", "kitty tray"), ("sandthrone",), ("Catrina",), (COLOR, SOCK), "Cat Litter", (18, 120)),
)
# fmt: on

BRANDS: dict[str, tuple[str, ...]] = {
    SPORT: ("Strido", "Kestrelle", "Northbeam", "Flexora", "Pinecroft"),
    TECH: ("Quantelo", "Voxine", "Lumo Labs", "Kyrios", "Bitwell"),
    KITCHEN: ("Casa Brava", "Ovenly", "Marlowe", "Tavola", "Pepperidge & Co"),
    HOME: ("Nestora", "Halden", "Willowby", "Softwick", "Arbora"),
    GARDEN: ("Ironvale", "Verdano", "Gritstone", "Hobbart", "Makro Pro"),
    PETS: ("Pawsome", "Bristle & Tail", "Rufford", "Meadowpet", "Finnigan"),
}
"""Brands per department; the first is the house brand, the commonest."""

VALUE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("crimson", "scarlet"), "blue": ("navy",), "grey": ("gray", "charcoal"), "green": ("olive",),
    "women": ("ladies",), "men": ("mens",), "kids": ("children",), "stainless steel": ("inox",),
    "wireless": ("bluetooth",), "25 ft": ("25 foot",), "50 ft": ("50 foot",), "100 ft": ("100 foot",),
    "8 inch": ('8"',), "10 inch": ('10"',), "12 inch": ('12"',), "5 lb": ("5 pound",),
}  # fmt: skip
"""How shoppers word a value that the catalogue words differently."""

ABBREVIATIONS: dict[str, str] = {
    "stainless steel": "SS", "black": "blk", "white": "wht", "women": "W", "men": "M", "wireless": "wrls",
    "pack of 2": "2pk", "pack of 6": "6pk", "pack of 12": "12pk", "aluminium": "alu", "medium": "med",
}  # fmt: skip
"""How hurried sellers word a value in a title."""

PRAISE: tuple[str, ...] = (
    "Premium",
    "Best Seller",
    "2026 Edition",
    "Everyday",
    "Professional",
    "Classic",
    "New",
)

SENTENCES: tuple[str, ...] = (
    "Made for daily use and easy to care for.",
    "A reliable choice that lasts for years.",
    "Our customers praise the comfort and the finish.",
    "Ships in recycled packaging with a two year warranty.",
    "Designed with attention to every detail.",
)
