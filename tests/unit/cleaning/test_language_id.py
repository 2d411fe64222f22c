"""language_id: Azerbaijani is told from its relatives, with a model that is there already."""

import multiprocessing
import sys
import types

import pytest

from dilqur.cleaning.language_id import LanguageIdentifier, spread
from dilqur.common.errors import InputError

# Sentences of everyday life, written for this test: those of one language are no translations of another's.
SENTENCES = {
    "az": """Səhər tezdən durub dənizin kənarında bir az gəzmişəm.
Uşaqlar həyətdə top oynayır, nənələri isə eyvandan onlara baxır.
Bu il üzüm yaxşı yetişib, ona görə də qonşulara da pay göndərəcəyik.
Qatar Gəncəyə axşam saat doqquzda çatmalı idi, amma yolda ləngidi.
Mənə elə gəlir ki, bu məsələni sabah bir də müzakirə etməliyik.
Kitabxanaçı bizə köhnə əlyazmaların harada saxlandığını göstərdi.
Yağış kəsən kimi bazara çıxıb təzə göyərti aldıq.
Onun səsi o qədər yavaş idi ki, arxa cərgədə heç kim eşitmədi.
Həkim dedi ki, dərmanı gündə iki dəfə, yeməkdən sonra içmək lazımdır.
Dağın ətəyindəki kənddə cəmi otuz ev qalıb.
Müəllim şagirdlərdən hər birinə öz sevdiyi şeiri əzbərləməyi tapşırdı.
Pəncərədən baxanda küçədəki ağacların hamısı çiçəkləmişdi.
Telefonunun batareyası bitdiyinə görə mənə zəng edə bilməyib.
Bizim məhəllədə hamı bir-birini tanıyır və köməyə çatır.
Qış gələndə sobanın başına yığışıb nağıl danışardıq.
Şirkət yeni işçilərə üç ay ərzində təlim keçəcək.
Gəminin kapitanı küləyin istiqamətini dəyişdiyini hiss etdi.
Bacım toy üçün aldığı paltarı hələ heç kimə göstərməyib.
Çayın üstündəki körpü keçən yaz daşqından sonra təmir olundu.
Sənin dediyin yol daha uzundur, gəl bu tərəfdən gedək.
Axşam yeməyinə plov bişirib qonaqları gözləyirik.
Hökumət kənd təsərrüfatına ayrılan vəsaiti artırmağı qərara aldı.""",
    "tr": """Dün gece geç saatlere kadar arkadaşlarımla sohbet ettik.
Annem mutfakta çorba pişirirken ben de sofrayı kurdum.
Otobüs durağında yarım saat bekledim ama kimse gelmedi.
Bu kitabı okuduktan sonra düşüncelerim tamamen değişti.
Belediye parktaki bütün bankları yenilemeye karar vermiş.
Köpeğimiz yabancı birini görünce hemen havlamaya başlar.
Öğretmenimiz yarınki sınavın ertelendiğini söyledi.
Deniz kıyısında yürümek bana her zaman huzur verir.
Faturayı ödemeyi unuttuğumuz için elektriğimiz kesilmiş.
Yağmur dinince çocuklar yeniden sokağa çıktılar.
Geçen hafta aldığım ayakkabılar ayağımı çok acıtıyor.
Komşumuz her sabah bahçesindeki çiçekleri sular.
Bilgisayarım bozulduğu için ödevimi yetiştiremedim.
Şehrin gürültüsünden uzaklaşmak isteyenler köye taşınıyor.
Toplantıya katılamayacağımı dün kendisine bildirmiştim.
Kahvaltıda peynir, zeytin ve taze ekmek vardı.
Doktor ona daha fazla su içmesi gerektiğini anlattı.
Trenin kalkmasına beş dakika var, acele etmemiz lazım.
Bu mahallede eskiden küçük bir sinema bulunuyordu.
Babam emekli olduktan sonra resim yapmaya başladı.
Yeni açılan lokantanın yemekleri gerçekten çok lezzetli.
Hiçbirimiz böyle bir sonuç beklemiyorduk doğrusu.""",
    "uz": """Bugun ertalab bozorga borib, meva va sabzavot sotib oldik.
Ukam universitetda o'qiydi, kelasi yil bitirishi kerak.
Bu yerda havo juda issiq, shuning uchun soyada o'tiramiz.
Mehmonlar kelishidan oldin uyni tozalab qo'yishimiz kerak.
Otam har kuni kechqurun gazeta o'qib, choy ichadi.
Qishlog'imizdan shahargacha bir soatlik yo'l bor.
U menga yangi kitobini sovg'a qilganidan juda xursandman.
Bolalar maktabdan qaytib kelgach, darslarini tayyorlashdi.
Do'stim bilan ertaga tog'ga chiqishga kelishib oldik.
Onam pishirgan osh hammaga juda yoqdi.
Telefonimni qayerga qo'yganimni eslay olmayapman.
Yomg'ir yog'gani sababli o'yin boshqa kunga qoldirildi.
Shifokor menga ko'proq dam olishni maslahat berdi.
Bu ko'chada yangi do'kon va kutubxona ochildi.
Biz yozda dengiz bo'yiga sayohat qilishni rejalashtiryapmiz.
Opam chet elda ishlaydi, lekin har hafta qo'ng'iroq qiladi.
Poyezd kech qolgani uchun majlisga ulgura olmadim.
Bog'imizdagi o'rik daraxtlari erta bahorda gulladi.
Uning gaplari menga hech ham to'g'ri kelmadi.
Hukumat yo'llarni ta'mirlash uchun mablag' ajratdi.
Kecha televizorda qiziqarli bir film ko'rsatishdi.
Men bu masalani o'zim hal qilishim mumkin.""",
    "tk": """Biz şu gün irden bazara gidip, täze miwe satyn aldyk.
Inim uniwersitetde okaýar, geljek ýyl ony gutarmaly.
Howa gaty yssy bolansoň, agajyň kölegesinde oturdyk.
Myhmanlar gelmänkä öýi arassalap goýmaly.
Kakam her gün agşam gazet okap, gök çaý içýär.
Obamyzdan şähere çenli bir sagatlyk ýol bar.
Ol maňa täze kitabyny sowgat berdi.
Çagalar mekdepden gelip, sapaklaryny taýýarladylar.
Dostum bilen ertir daga çykmagy maslahatlaşdyk.
Ejemiň bişiren palawy hemmämize ýarady.
Telefonymy nirede goýandygymy ýadyma salyp bilemok.
Ýagyş ýagandygy üçin oýun başga güne geçirildi.
Lukman maňa köpräk dynç almagy maslahat berdi.
Bu köçede täze dükan we kitaphana açyldy.
Biz tomusda deňziň kenaryna gezelenje gitmekçi.
Uýam daşary ýurtda işleýär, ýöne her hepde jaň edýär.
Otly giç galany üçin men ýygnaga ýetişip bilmedim.
Bagymyzdaky erik agaçlary ir ýazda gülledi.
Onuň aýdan sözleri maňa asla ýaramady.
Döwlet ýollary abatlamak üçin pul goýberdi.
Düýn telewizorda gyzykly bir film görkezildi.
Atlaryň owadanlygy barada köp aýdym aýdylýar.""",
}
SENTENCES = {language: sentences.split("\n") for language, sentences in SENTENCES.items()}


def confusion_table(identifier, characters=None):
    """{language: {what it was taken for: how many of its sentences}}, of their first `characters`."""
    table = {}
    for language, sentences in SENTENCES.items():
        row = table[language] = {}
        for sentence in sentences:
            code, _ = identifier.identify(sentence[:characters])
            row[code] = row.get(code, 0) + 1
    return table


@pytest.fixture(scope="module")
def identifier():
    return LanguageIdentifier()


def test_azerbaijani_is_told_from_its_relatives(identifier):
    table = confusion_table(identifier)
    assert table["az"] == {"az": 22}
    assert sum(table[language].get("az", 0) for language in ("tr", "uz", "tk")) == 0
    assert all(table[language][language] >= 21 for language in table)


def test_a_sentence_cut_to_thirty_characters_mostly_still_is(identifier):
    table = confusion_table(identifier, 30)
    assert table["az"]["az"] >= 20  # of 22
    assert sum(table[language].get("az", 0) for language in ("tr", "uz", "tk")) <= 2  # of 66


def test_probabilities_are_some(identifier):
    code, probability = identifier.identify(SENTENCES["az"][0])
    assert code == "az" and 0.5 < probability <= 1
    for text in ("", "12 345", "— … !"):
        assert identifier.identify(text) == ("und", 0.0)


def test_a_code_that_the_model_lacks_is_refused(identifier):
    identifier.check("az")
    with pytest.raises(
        InputError, match="language: 'aze' is not among the identifier's 140 languages; did you mean az"
    ):
        identifier.check("aze")


def test_a_long_text_is_looked_at_in_three_places():
    text = " ".join(f"söz{i}" for i in range(1000))
    start, middle, end = spread(text, 90).split("\n")
    assert text.startswith(start + " ") and text.endswith(" " + end) and f" {middle} " in text[3000:5000]
    assert len(spread(text, 90)) <= 90
    assert spread("qısa mətn", 90) == "qısa mətn"
    assert len(spread("ə" * 1000, 90)) == 92  # without a space to cut at: three parts, two line ends


def test_an_english_page_with_an_azerbaijani_title_is_english(identifier):
    text = SENTENCES["az"][0] + " The old town lies on a hill above the river, and visitors come to see it. " * 30
    assert identifier.identify(text)[0] == "en"


def test_it_works_in_a_forked_process(identifier):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(identifier_in_child, [SENTENCES["tr"][1]]) == ["tr"]


def identifier_in_child(text):
    return LanguageIdentifier().identify(text)[0]


def test_a_model_that_is_none_is_named(tmp_path):
    (tmp_path / "model.plzma").write_bytes(b"no model")
    for name, words in (
        ("model.plzma", "no model to identify languages with"),
        ("none.xz", "no model to identify languages with"),
        ("none.bin", "no such file; no model is ever fetched"),
    ):
        with pytest.raises(InputError, match=words):
            LanguageIdentifier(str(tmp_path / name))


def test_fasttext_is_asked_for_only_with_a_model_of_its_own(tmp_path, monkeypatch):
    model = tmp_path / "lid.ftz"
    model.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "fasttext", None)  # not installed
    with pytest.raises(InputError, match="a model of fastText; pip install fasttext"):
        LanguageIdentifier(str(model))


def test_labels_of_fasttext_lose_their_prefix(tmp_path, monkeypatch):
    def predict(text, k, threshold, on_error):
        assert text.count("\n") == 1 and text.endswith("\n")  # it reads a line
        return [(0.6, "__label__azj_Latn"), (0.3, "__label__tur_Latn"), (0.1, "__label__eng_Latn")][: k if k > 0 else 3]

    model = types.SimpleNamespace(f=types.SimpleNamespace(predict=predict))
    monkeypatch.setitem(sys.modules, "fasttext", types.SimpleNamespace(load_model=lambda path: model))
    (tmp_path / "glotlid.bin").write_bytes(b"")
    identifier = LanguageIdentifier(str(tmp_path / "glotlid.bin"))
    assert identifier.identify("bir\niki") == ("azj_Latn", 0.6)
    with pytest.raises(InputError, match="did you mean azj_Latn"):
        identifier.check("aze_Latn")
